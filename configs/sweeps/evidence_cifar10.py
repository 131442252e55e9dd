"""Kinds of conditioning on CIFAR-10 with a narrow network; 16 runs, half an hour each on one CPU core.

    python main.py --mode=sweep --config=configs/sweeps/evidence_cifar10.py \
        --workdir=workdirs/evidence/cifar10 --config.data.data_dir=DIR --jobs=2

The analysis is in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import cifar10_edm
from lora_diffusion_jax import grids


def get_config() -> ConfigDict:
    """A network of 16 and 32 channels with one block a level; 25,600 images."""
    config = cifar10_edm.get_config()
    config.class_conditional = True
    config.model.channels = 16
    config.model.num_blocks = 1
    config.lora.bases = 9
    config.lora.rank = 2
    config.lora.widths = (16, 8)

    config.train.batch_size = 64
    config.train.total_images = 64 * 400
    config.train.learning_rate = 2e-3
    config.train.rampup_images = 64 * 50
    config.train.ema_halflife_images = 2_560
    config.train.log_every = 64 * 50
    config.train.checkpoint_every = 64 * 200
    config.train.sample_every = 64 * 400
    config.train.keep = 1
    config.eval.num_samples = 0
    return config


def sweep(add: grids.Add) -> None:
    """Adds the baseline, UC-LoRA beside it and alone, and LoRA without a condition, with four seeds."""
    kinds = grids.chain(
        [{"lora.mode": "baseline"}],
        [{"lora.mode": "with_lora", "lora.adapter": "uc"}],
        [{"lora.mode": "only_lora", "lora.adapter": "uc"}],
        [{"lora.mode": "with_lora", "lora.adapter": "static", "lora.bases": 22}],
    )
    add(grids.product(kinds, grids.over("train.seed", range(4))))
