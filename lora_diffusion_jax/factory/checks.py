"""The choices a config has, and what no part of the system can work with."""

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.diffusion import precond, samplers
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.blocks import REMAT

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

PRECONDS = precond.PRECONDS

_POSITIONAL = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}

VARIANTS = {
    "ddpmpp": _POSITIONAL,
    "ncsnpp": {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": _POSITIONAL,
}


def choose(field: str, value: Any, known: Any) -> Any:
    """Returns known[value], or raises UserError naming the field and what it may be."""
    if value not in known:
        raise UserError(f"{field} is {value!r}; it must be one of {', '.join(map(str, known))}.")
    return known[value] if isinstance(known, dict) else value


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no part of the system can work with.

    What a single part knows better (sampler grids, adapter sizes, batch against mesh) it checks itself.
    """
    choose("model.name", config.model.name, VARIANTS)
    choose("precond.name", config.precond.name, PRECONDS)
    choose("lora.mode", config.lora.mode, ("baseline", "with_lora", "only_lora"))
    choose("sampler.name", config.sampler.name, samplers.SAMPLERS)
    choose("dtype", config.dtype, DTYPES)
    choose("train.remat", config.train.remat, REMAT)
    _check_numbers(config)
    labels = augmentation.EDM_TRAINING.label_dim
    if config.augment.p and config.model.augment_dim not in (0, labels):
        raise UserError(
            f"model.augment_dim is {config.model.augment_dim}; the augmentation has {labels} labels "
            "(0 does not feed them to the network)."
        )
    if config.lora.mode != "baseline" and not config.lora.widths:
        raise UserError("lora.widths is empty; the composition MLP needs a hidden layer at least.")
    if config.train.freeze_base and config.lora.mode == "baseline":
        raise UserError(
            "train.freeze_base=True leaves nothing to train with lora.mode=baseline; choose with_lora."
        )
    if config.data.name and config.data.path:
        raise UserError(
            f"Both data.name={config.data.name} and data.path={config.data.path} are set; "
            "clear one of them (--config.data.name='')."
        )


def _check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number outside of its range, which would fail late or not at all."""
    counts = [f"train.{f}" for f in ("batch_size", "total_images")]
    counts += [f"model.{f}" for f in ("channels", "num_blocks", "channel_mult_emb")]
    ranges = dict.fromkeys([*counts, "sampler.batch_size"], (1, float("inf")))
    unlimited = ("train.microbatch", "eval.num_samples", "eval.final_num_samples", "eval.num_steps")
    ranges |= dict.fromkeys(unlimited, (0, float("inf")))
    ranges["train.seed"] = (0, 2**32 - 1)  # JAX would drop what lies above
    for name, (low, high) in ranges.items():
        group, field = name.split(".")
        value = config[group][field]
        if not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise UserError(f"{name} is {value}; it must be {limit}.")
    if not config.model.channel_mult or min(config.model.channel_mult) < 1:
        raise UserError(
            f"model.channel_mult is {tuple(config.model.channel_mult)}; give one factor of at least 1 "
            "per level."
        )
    for name, value in (
        ("augment.p", config.augment.p),
        ("model.dropout", config.model.dropout),
        ("model.label_dropout", config.model.label_dropout),
    ):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it is a probability, 0 to 1.")
    for field in ("sigma_data", "p_std"):
        if not config.precond[field] > 0:
            raise UserError(f"precond.{field} is {config.precond[field]}; it must be above 0.")
