"""Samplers: from unit normal noise to images through denoise(x, sigma) -> D."""

from lora_diffusion_jax.diffusion.samplers.plan import BoundDenoiser, Plan, bind, run_plan
from lora_diffusion_jax.diffusion.samplers.search import find_euler_steps, searched_grid
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
    "find_euler_steps",
    "make_plan",
    "run_plan",
    "searched_grid",
    "to_uint8",
]
