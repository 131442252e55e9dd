"""Small digits runs for docs/results.md: 400 steps of 214,055 parameters (188,945 without adapters).

    python main.py --mode=train --config=configs/evidence.py --workdir=workdirs/evidence_one

The base of the configs in configs/sweeps/evidence_*.py. Their adapters add about equally many parameters
(`EQUAL`), and at the centre 9 bases of rank 2, in layers that are 32 wide.
"""

from ml_collections import ConfigDict

from configs import digits
from lora_diffusion_jax import grids

# lora.adapter -> sizes with which it adds 25,110 parameters (`uc`), or as many within 2 %
EQUAL: dict[str, dict[str, int]] = {
    "uc": {"lora.bases": 9},
    "static": {"lora.bases": 22},
    "time": {"lora.bases": 14},
    "time_class": {"lora.bases": 8},
}
SEEDS = range(8)


def adapter(name: str, mode: str) -> grids.Grid:
    """A run with an adapter, at its size of equal parameters."""
    return [{"lora.mode": mode, "lora.adapter": name, **EQUAL[name]}]


def shorten(config: ConfigDict) -> None:
    """Makes a config's network narrow and its training 400 steps of 64 images."""
    config.model.channels = 16
    config.lora.bases = 9
    config.lora.rank = 2
    config.lora.widths = (16, 8)

    config.train.batch_size = 64
    config.train.total_images = 64 * 400
    config.train.learning_rate = 2e-3
    config.train.rampup_images = 64 * 50
    config.train.ema_halflife_images = 2_560
    config.train.log_every = 64 * 100
    config.train.checkpoint_every = 64 * 400
    config.train.sample_every = 64 * 400
    config.train.keep = 1
    config.eval.num_samples = 0  # eval_fid.py and --mode=compare measure afterwards


def get_config() -> ConfigDict:
    """The digits of configs/digits.py, with a narrower network and fewer images."""
    config = digits.get_config()
    shorten(config)
    config.lora.num_timesteps = 100
    config.eval.num_steps = 9
    config.sampler.num_steps = 9  # 17 evaluations
    return config
