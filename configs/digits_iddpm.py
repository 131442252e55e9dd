"""Class-conditional digits (8x8, gray) in discrete time: improved-diffusion's network and process, small.

    python main.py --mode=train --config=configs/digits_iddpm.py --workdir=workdirs/digits_iddpm

With TimeLoRA and ClassLoRA (`lora.adapter=time_class`); `time`, `class` and `uc` by override. 973,690
parameters. Runs of 200 steps are compared in docs/analysis.md.
"""

from ml_collections import ConfigDict

from configs import digits
from lora_diffusion_jax.default_config import sampler


def get_config() -> ConfigDict:
    """The digits of configs/digits.py with a process of 1000 steps."""
    config = digits.get_config()
    config.model.name = "improved"
    config.model.num_heads = 2

    config.precond.name = "ddpm"
    config.precond.num_steps = 1000

    config.lora.adapter = "time_class"
    config.lora.bases = 11

    config.train.ema_rampup_ratio = 0.0

    config.sampler = sampler("ddpm")
    config.sampler.num_steps = 100
    return config
