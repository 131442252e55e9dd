"""The only reader of ConfigDict: configs become networks, losses, samplers, data and runs."""

from lora_diffusion_jax.factory.checks import DTYPES, check, choose
from lora_diffusion_jax.factory.data import build_batches, complete, open_heldout, open_source
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    bypass_lora,
    fold_lora,
    forward_flops,
    image_shape,
    init_variables,
    num_classes,
    variable_shapes,
)
from lora_diffusion_jax.factory.objectives import Objective, build_objective, build_sampler
from lora_diffusion_jax.factory.pretrained import (
    config_from_dict,
    load_workdir,
    with_config,
)
from lora_diffusion_jax.factory.training import (
    build_cadence,
    build_generator,
    build_mesh,
    build_optimizer,
    build_step,
    trainable,
)

__all__ = [
    "DTYPES",
    "Objective",
    "build_batches",
    "build_denoiser",
    "build_generator",
    "build_mesh",
    "build_objective",
    "build_optimizer",
    "build_sampler",
    "build_cadence",
    "build_step",
    "bypass_lora",
    "check",
    "choose",
    "complete",
    "config_from_dict",
    "fold_lora",
    "forward_flops",
    "image_shape",
    "init_variables",
    "load_workdir",
    "num_classes",
    "open_heldout",
    "open_source",
    "trainable",
    "variable_shapes",
    "with_config",
]
