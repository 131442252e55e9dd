"""Samplers: from unit normal noise to images through denoise(x, sigma) -> D."""

from lora_diffusion_jax.diffusion.samplers.plan import (
    BoundDenoiser,
    Plan,
    bind,
    run_plan,
    stack,
    step_noise,
)
from lora_diffusion_jax.diffusion.samplers.solvers import Churn, dpmpp_2m_plan, make_plan
from lora_diffusion_jax.diffusion.samplers.table import (
    CHOICES,
    SAMPLERS,
    ablation_sampler,
    edm_sampler,
    to_uint8,
)

__all__ = [
    "CHOICES",
    "SAMPLERS",
    "BoundDenoiser",
    "Churn",
    "Plan",
    "ablation_sampler",
    "bind",
    "dpmpp_2m_plan",
    "edm_sampler",
    "make_plan",
    "run_plan",
    "stack",
    "step_noise",
    "to_uint8",
]
