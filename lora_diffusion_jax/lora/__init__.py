"""Conditioned low-rank adapters for any linen model.

wrapped = lora.attach(module, sites=r".*/(qkv|proj)", adapter=lora.UCLoRA(rank=4, bases=18),
                      condition=r".*/map")
"""

from lora_diffusion_jax.lora import params
from lora_diffusion_jax.lora.adapter import (
    ClassLoRA,
    LowRankAdapter,
    SumOfAdapters,
    TimeLoRA,
    UCLoRA,
)
from lora_diffusion_jax.lora.attach import Adapted, attach
from lora_diffusion_jax.lora.inspect import composition_weights, list_sites
from lora_diffusion_jax.lora.params import count, fold, merge, select, split

__all__ = [
    # Attaching
    "attach",
    "Adapted",
    "list_sites",
    # Adapters
    "UCLoRA",
    "TimeLoRA",
    "ClassLoRA",
    "SumOfAdapters",
    "LowRankAdapter",
    # Parameters
    "params",
    "split",
    "merge",
    "select",
    "count",
    "fold",
    "composition_weights",
]
