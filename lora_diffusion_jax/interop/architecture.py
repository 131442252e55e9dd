"""The plain description of a network's architecture that files carry, and its validation.

Fields: precond (edm, vp, ve, iddpm), precond_args (constants by name), model (ddpmpp, ncsnpp, adm),
img_resolution, img_channels, label_dim, augment_dim, model_channels, channel_mult, num_blocks,
attn_resolutions, dropout, label_dropout, embedding_type, encoder_type, decoder_type,
channel_mult_noise, channel_mult_emb, resample_filter, use_fp16, use_affine (False: the blocks have
no scale-and-shift), lora (null, or rank, bases and widths of UC-LoRA).
"""

import math
from collections.abc import Callable
from typing import Any

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.readers.machine import shorten, show

Architecture = dict[str, Any]  # JSON types only; the fields are those of `FIELDS`


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda v: v in choices


def _integers(low: int, high: int, most: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) <= most and all(map(_integer(low, high), v))


def _are_taps(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 64
        and all(type(tap) in (int, float) and math.isfinite(tap) for tap in value)
        and sum(value) != 0
    )


def _rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_lora(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"rank", "bases", "widths"}
        and _integer(1, 4096)(value["rank"])
        and _integer(1, 4096)(value["bases"])
        and bool(value["widths"])
        and _integers(1, 65536, 16)(value["widths"])
    )


def _is_constants(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(k) is str and type(v) in (int, float) and math.isfinite(v) for k, v in value.items()
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "precond": _one_of("edm", "vp", "ve", "iddpm"),
    "precond_args": _is_constants,
    "model": _one_of("ddpmpp", "ncsnpp", "adm"),
    "img_resolution": _integer(1, 8192),
    "img_channels": _integer(1, 1024),
    "label_dim": _integer(0, 10_000_000),
    "augment_dim": _integer(0, 65536),
    "model_channels": _integer(1, 65536),
    "channel_mult": lambda v: bool(v) and _integers(1, 1024, 12)(v),
    "num_blocks": _integer(1, 256),
    "attn_resolutions": _integers(1, 8192, 64),
    "dropout": _rate,
    "label_dropout": _rate,
    "embedding_type": _one_of("positional", "fourier"),
    "encoder_type": _one_of("standard", "residual"),
    "decoder_type": _one_of("standard"),
    "channel_mult_noise": _integer(1, 64),
    "channel_mult_emb": _integer(1, 64),
    "resample_filter": _are_taps,
    "use_fp16": lambda v: type(v) is bool,
    "use_affine": lambda v: type(v) is bool,
    "lora": _is_lora,
}


def check_architecture(architecture: Any) -> Architecture:
    """Returns an architecture all of whose fields are there, known and within reason.

    Raises:
        UserError: a field is missing, unknown, or has a value that this project does not have.
    """
    if not isinstance(architecture, dict):
        raise UserError(
            f"The architecture is a {type(architecture).__name__}, not a table of fields."
        )
    architecture = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in architecture.items()
    }
    missing = [name for name in FIELDS if name not in architecture]
    unknown = [shorten(str(name)) for name in architecture if name not in FIELDS]
    if missing or unknown:
        raise UserError(
            "The architecture "
            + " and ".join(
                f"{verb} {', '.join(names)}"
                for verb, names in (("lacks", missing), ("has unknown", unknown))
                if names
            )
            + "."
        )
    for name, valid in FIELDS.items():
        if not valid(architecture[name]):
            raise UserError(
                f"The architecture has {name} = {show(architecture[name])}, "
                "which this project does not have."
            )
    return {name: architecture[name] for name in FIELDS}
