"""Samplers: from unit normal noise to images through denoise(x, sigma) -> D."""

from lora_diffusion_jax.diffusion.samplers.plan import BoundDenoiser, Plan, bind, run_plan
from lora_diffusion_jax.diffusion.samplers.solvers import Churn, make_plan
from lora_diffusion_jax.diffusion.samplers.table import (
    SAMPLERS,
    ablation_sampler,
    edm_sampler,
    to_uint8,
)

__all__ = [
    "SAMPLERS",
    "BoundDenoiser",
    "Churn",
    "Plan",
    "ablation_sampler",
    "bind",
    "edm_sampler",
    "make_plan",
    "run_plan",
    "to_uint8",
]
