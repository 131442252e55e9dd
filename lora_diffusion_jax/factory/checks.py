"""Validates config values, before anything is built or compiled."""

import math
import re
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.diffusion import samplers
from lora_diffusion_jax.diffusion.discrete import SCHEDULES
from lora_diffusion_jax.diffusion.guidance import check_interval
from lora_diffusion_jax.diffusion.precond import DDPM_LOSSES, PRECONDS
from lora_diffusion_jax.diffusion.schedules import MAX_STEPS
from lora_diffusion_jax.errors import UserError, choose, printable
from lora_diffusion_jax.models import NETWORKS
from lora_diffusion_jax.models.blocks import REMAT

CLASS_ADAPTERS = ("class", "time_class")  # of lora.adapter: those with a pair per class
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

_CHOICES = {
    "model.name": NETWORKS,
    "model.embedding": ("positional", "fourier"),
    "model.encoder": ("standard", "residual"),
    "precond.name": PRECONDS,
    "precond.schedule": SCHEDULES,
    "precond.loss": DDPM_LOSSES,
    "lora.mode": ("baseline", "with_lora", "only_lora"),
    "lora.adapter": lora.ADAPTERS,
    "sampler.name": samplers.SAMPLERS,
    "sampler.fold": ("auto", "on", "off"),
    "guidance.name": ("none", "classifier_free", "autoguidance", "adapters"),
    "dtype": DTYPES,
    "train.remat": REMAT,
}
_RANGES = {  # fields -> their range; upper bounds keep a damaged file from asking for an endless network
    ("data.image_size", "data.image_width", "data.channels"): (0, 8192),
    ("data.num_classes",): (0, 10_000_000),  # 0, here and above: as the data set has it
    ("model.channels",): (1, 65_536),
    ("model.channel_mult_emb", "model.channel_mult_noise", "model.num_blocks"): (1, 256),
    ("model.num_heads",): (1, 4096),
    ("model.num_heads_upsample",): (-1, 4096),
    ("model.augment_dim",): (0, 65_536),
    ("model.dropout", "model.label_dropout", "augment.p"): (0, 1),
    ("precond.num_steps",): (1, 1_000_000),
    ("lora.num_timesteps",): (0, 1_000_000),
    ("lora.rank", "lora.bases"): (1, 4096),
    ("train.batch_size", "train.total_images", "sampler.batch_size"): (1, math.inf),
    ("train.microbatch", "eval.num_samples", "eval.final_num_samples"): (0, math.inf),
    ("train.new_classes", "train.max_nonfinite"): (0, math.inf),
    ("sampler.num_steps", "eval.num_steps"): (0, MAX_STEPS),
    ("train.learning_rate", "train.ema_halflife_images", "train.ema_rampup_ratio"): (0, math.inf),
    ("train.rampup_images", "data.memory_limit_gib"): (0, math.inf),
    ("data.workers",): (0, 1024),
    ("train.seed",): (0, 2**32 - 1),  # JAX would drop the bits above
}
_TUPLES = {  # field -> range of its length, range of its integers
    "model.channel_mult": ((1, 12), (1, 1024)),
    "model.attn_resolutions": ((0, 64), (1, 8192)),
    "model.attn_levels": ((0, 12), (0, 11)),
    "model.resample_filter": ((2, 64), (1, 65_536)),
    "lora.widths": ((1, 16), (1, 65_536)),
}


# The pattern of the sites may come with an untrusted run, and Python's matcher tries every way in which a
# pattern can fit: of nested repetitions more than there are atoms. Counting the ways beforehand needs no
# second engine and no clock, and refuses the same patterns on every machine.
_SITES_LENGTH = 200
_SITES_WAYS = 1_000_000
_PATH_LENGTH = 40  # of a layer's path, about
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|.", re.DOTALL)


def check(config: ConfigDict) -> None:
    """Raises UserError for invalid values.

    Parts of the system check what they alone know: sampler grids, the batch against the mesh.
    """
    _check_finite(config)
    _check_choices(config)
    _check_ranges(config)
    for field in ("sites", "scaled"):
        check_sites(config.lora[field], f"lora.{field}")
    _check_guidance(config)
    _check_training(config)
    _check_data(config)


def _check_finite(config: ConfigDict) -> None:
    for field, value in flatten_dict(config.to_dict(), sep=".").items():
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(v, float) and not math.isfinite(v) for v in numbers) and not (
            field == "sampler.s_max" and value == math.inf
        ):
            raise UserError(f"{field} is {printable(value)}; it must be a finite number.")


def _check_choices(config: ConfigDict) -> None:
    for field, known in _CHOICES.items():
        if (value := _get(config, field)) is not None:
            choose(field, value, known)
    sees = lora.CONDITIONS.get(config.lora.adapter)
    if sees is None or (sees != ("map",) and not set(sees) <= {"time", "class"}):
        raise UserError(
            f"lora.adapter is {config.lora.adapter!r}, for which lora.CONDITIONS has {sees}; expected "
            "('map',), ('time',), ('class',), ('time', 'class') or (). Add what the adapter sees."
        )


def _check_ranges(config: ConfigDict) -> None:
    for fields, (low, high) in _RANGES.items():
        for field in fields:
            if (value := _get(config, field)) is not None and not low <= value <= high:
                limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise UserError(f"{field} is {value}; it must be {limit}.")
    for field, ((fewest, most), (low, high)) in _TUPLES.items():
        if (value := _get(config, field)) is not None and not (
            fewest <= len(value) <= most and all(type(v) is int and low <= v <= high for v in value)
        ):
            raise UserError(
                f"{field} is {printable(list(value))}; expected {fewest} to {most} integers from {low} "
                f"to {high}."
            )
    for field in ("sigma_data", "p_std"):
        if not config.precond[field] > 0:
            raise UserError(f"precond.{field} is {config.precond[field]}; it must be above 0.")


def _check_training(config: ConfigDict) -> None:
    """What is trained: the augmentation's labels, frozen parameters, new classes."""
    labels = augmentation.EDM_TRAINING.augment_dim
    if config.augment.p and config.model.augment_dim not in (0, labels):
        raise UserError(
            f"model.augment_dim is {config.model.augment_dim}; the augmentation has {labels} labels "
            "(0 does not feed them to the network)."
        )
    if config.train.freeze_base and config.lora.mode == "baseline":
        raise UserError(
            "train.freeze_base=True leaves nothing to train with lora.mode=baseline; choose with_lora."
        )
    new = config.train.new_classes
    if new and not (config.train.freeze_base and config.lora.adapter in CLASS_ADAPTERS):
        raise UserError(
            f"train.new_classes is {new}; it needs train.freeze_base=True and lora.adapter=class or "
            "time_class, whose pairs it chooses from."
        )
    if new and config.data.num_classes and new > config.data.num_classes:
        raise UserError(
            f"train.new_classes is {new}, but data.num_classes is {config.data.num_classes}; give the "
            "number of classes to train, the last ones."
        )


def scales_adapters(config: ConfigDict) -> bool:
    """Whether adapters add more or less in sampling than they were trained to."""
    return config.lora.scale != 1 or config.lora.interval != ()


def _check_guidance(config: ConfigDict) -> None:
    """Guidance and the scale of adapters, as far as the config tells."""
    for field in ("guidance.interval", "lora.interval"):
        interval = _get(config, field)
        if interval != ():
            check_interval(field, interval)
    guidance = config.guidance
    if guidance.name == "none" and guidance.scale != 1:
        raise UserError(
            f"guidance.scale is {guidance.scale:g}, but guidance.name=none; choose classifier_free, "
            "autoguidance or adapters."
        )
    if config.lora.mode == "baseline" and (scales_adapters(config) or guidance.name == "adapters"):
        raise UserError(
            "lora.mode=baseline has no adapters to scale; leave out lora.scale, lora.interval and "
            "guidance.name=adapters."
        )
    if guidance.name == "classifier_free" and not (
        config.class_conditional and config.model.label_dropout
    ):
        raise UserError(
            "guidance.name=classifier_free needs a network that was trained with and without class labels "
            "(class_conditional=True, model.label_dropout=0.1); this one was not. Train one, or choose "
            "autoguidance or adapters."
        )
    if guidance.name == "autoguidance" and not guidance.workdir:
        raise UserError(
            "guidance.name=autoguidance needs guidance.workdir, the run of the weaker network, and "
            "guidance.step where it is an early checkpoint."
        )


def _check_data(config: ConfigDict) -> None:
    names = config.data.class_names
    if not all(isinstance(name, str) for name in names):
        raise UserError("data.class_names must hold text alone; give one name per class.")
    if names and config.data.num_classes not in (0, len(names)):
        raise UserError(
            f"data.class_names has {len(names):,} names for data.num_classes="
            f"{config.data.num_classes:,}; give one per class, or none."
        )
    if config.data.name and config.data.path:
        raise UserError(
            f"Both data.name={config.data.name} and data.path={config.data.path} are set; "
            "clear one of them (--config.data.name='')."
        )

    if config.data.floats or config.data.channels not in (0, 1, 3):
        _check_array(config)


def _check_array(config: ConfigDict) -> None:
    """Raises UserError for what is made for images alone."""
    kind = "floats" if config.data.floats else f"{config.data.channels} channels"
    if config.augment.p:
        raise UserError(
            f"augment.p={config.augment.p}, but the data are an array of {kind}: augmentation flips, turns "
            "and recolours images. Set --config.augment.p=0 (and --config.model.augment_dim=0)."
        )
    if config.data.floats and config.sampler.get("clip_denoised"):
        raise UserError(
            f"sampler.name={config.sampler.name} clips to [-1, 1], but the data are an array of floats. Set "
            "--config.sampler.clip_denoised=False."
        )
    if config.data.floats and config.precond.name == "ddpm":
        raise UserError(
            "precond.name=ddpm is for images of 8 bits (its bound counts their values, its samplers clip to "
            "[-1, 1]), but the data are an array of floats. Use precond.name=edm, vp or ve."
        )


def check_sites(pattern: str, field: str = "lora.sites") -> None:
    """Raises UserError for a pattern of layers that could take forever to match.

    Its parts can share out a path in at most so many ways: n + k over k for k repetitions and n
    characters, times the alternatives of each group. A repeated group would multiply them with itself.
    """
    if len(pattern) > _SITES_LENGTH:
        raise UserError(
            f"{field} has {len(pattern):,} characters; expected at most {_SITES_LENGTH}. List layers by "
            "what their paths share, such as '.*/(qkv|proj)'."
        )
    repeats, groups, ways, before = 0, [1], 1, ""  # groups: alternatives of those that are open
    for token in _TOKENS.findall(pattern):
        if token in ("{", "(?") or (token in ("*", "+", "?") and before == ")"):
            raise UserError(
                f"{field} is {printable(pattern, _SITES_LENGTH)!r}, which repeats a group, counts, or "
                "looks around; expected a pattern of names, '.', '*', '+', '?', [...], and (a|b)."
            )
        if token in ("*", "+"):
            repeats += 1
        elif token == "?":
            ways *= 2
        elif token in ("(", "(?:"):
            groups.append(1)
        elif token == "|":
            groups[-1] += 1
        elif token == ")" and len(groups) > 1:
            ways *= groups.pop()
        before = token
    ways *= math.prod(groups) * math.comb(_PATH_LENGTH + repeats, repeats)
    if ways > _SITES_WAYS:
        raise UserError(
            f"{field} is {printable(pattern, _SITES_LENGTH)!r}, which can fit a path in {ways:,} ways or "
            f"more; expected at most {_SITES_WAYS:,}. Use fewer '*', '+', '?' and '|'."
        )


def _get(config: ConfigDict, field: str) -> Any:
    """The value of a field, `model.channels` or `dtype`; None if this sampler does not have it."""
    group, _, name = field.rpartition(".")
    return config[group].get(name) if group else config[name]
