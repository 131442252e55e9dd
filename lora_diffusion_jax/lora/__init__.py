"""Conditioned low-rank adapters for any linen or nnx model.

wrapped = lora.attach(module, sites=r".*/(qkv|proj)", adapter=lora.UCLoRA(rank=4, bases=18),
                      condition=r".*/map")
"""

from lora_diffusion_jax.lora import params
from lora_diffusion_jax.lora.adapter import (
    ADAPTERS,
    CONDITIONS,
    ClassLoRA,
    LowRankAdapter,
    StaticLoRA,
    SumOfAdapters,
    TimeLoRA,
    UCLoRA,
)
from lora_diffusion_jax.lora.attach import Adapted, attach, composition_weights
from lora_diffusion_jax.lora.nnx import LoRAParam, adapter_tree, update_adapters
from lora_diffusion_jax.lora.params import count, fold, list_sites, merge, select, split, with_scale

__all__ = [
    # Attaching
    "attach",
    "LoRAParam",
    "Adapted",
    "composition_weights",
    # Adapters
    "ADAPTERS",
    "CONDITIONS",
    "UCLoRA",
    "TimeLoRA",
    "ClassLoRA",
    "StaticLoRA",
    "SumOfAdapters",
    "LowRankAdapter",
    # Parameters
    "params",
    "list_sites",
    "adapter_tree",
    "update_adapters",
    "split",
    "merge",
    "select",
    "count",
    "fold",
    "with_scale",
]
