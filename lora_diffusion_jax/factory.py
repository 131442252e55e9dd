"""The only reader of ConfigDict: configs become networks, losses, samplers and data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Images, Key, Labels, PyTree, Variables
from lora_diffusion_jax.data import augment as augmentation
from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion import losses, precond, samplers, schedules
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.adm_unet import ADMUNet
from lora_diffusion_jax.models.song_unet import SongUNet

CONDITION = "map"  # path of the U-Nets' mapping network: its output conditions UC-LoRA
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
PRECONDS = {"vp": precond.VP, "ve": precond.VE, "iddpm": precond.IDDPM}
SONG_VARIANTS = {
    "ddpmpp": {
        "embedding": "positional",
        "encoder": "standard",
        "channel_mult_noise": 1,
        "resample_filter": (1, 1),
    },
    "ncsnpp": {
        "embedding": "fourier",
        "encoder": "residual",
        "channel_mult_noise": 2,
        "resample_filter": (1, 3, 3, 1),
    },
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
    choose("model.name", config.model.name, ("ddpmpp", "ncsnpp", "adm"))
    choose("precond.name", config.precond.name, ("edm", *PRECONDS))
    choose("lora.mode", config.lora.mode, ("baseline", "with_lora", "only_lora"))
    choose("sampler.name", config.sampler.name, ("edm", "ablation"))
    choose("dtype", config.dtype, DTYPES)
    for field in ("batch_size", "total_images"):
        if config.train[field] < 1:
            raise UserError(f"train.{field} is {config.train[field]}; it must be at least 1.")
    for field in ("channels", "num_blocks"):
        if config.model[field] < 1:
            raise UserError(f"model.{field} is {config.model[field]}; it must be at least 1.")
    if not 0 <= config.augment.p <= 1:
        raise UserError(f"augment.p is {config.augment.p}; it is a probability, 0 to 1.")
    if config.train.freeze_base and config.lora.mode == "baseline":
        raise UserError(
            "train.freeze_base=True leaves nothing to train with lora.mode=baseline; choose with_lora."
        )
    if config.data.name and config.data.path:
        raise UserError(
            f"Both data.name={config.data.name} and data.path={config.data.path} are set; "
            "clear one of them (--config.data.name='')."
        )


def build_precond(config: ConfigDict) -> precond.Precond:
    """The preconditioning of `config.precond`."""
    if config.precond.name == "edm":
        return precond.EDM(sigma_data=config.precond.sigma_data)
    return choose("precond.name", config.precond.name, PRECONDS)()


def build_unet(config: ConfigDict) -> nn.Module:
    """The U-Net of `config.model`, without LoRA; sizes come from `config.data`."""
    model, data = config.model, config.data
    if not (data.image_size and data.channels):
        raise UserError(
            "The image size is not known: set data.image_size and data.channels, or name a data set "
            "(data.name or data.path) that can be opened."
        )
    common = {
        "resolution": data.image_size,
        "img_channels": data.channels,
        "out_channels": data.channels * build_precond(config).out_factor,
        "label_dim": num_labels(config),
        "augment_dim": model.augment_dim,
        "model_channels": model.channels,
        "channel_mult": tuple(model.channel_mult),
        "num_blocks": model.num_blocks,
        "attn_resolutions": tuple(model.attn_resolutions),
        "dropout": model.dropout,
        "label_dropout": model.label_dropout,
        "use_affine": config.lora.mode != "only_lora",
        "dtype": choose("dtype", config.dtype, DTYPES),
    }
    if model.name == "adm":
        return ADMUNet(**common)
    return SongUNet(**common, **choose("model.name", model.name, SONG_VARIANTS))


def num_labels(config: ConfigDict) -> int:
    """Width of the class labels the network takes; 0 for an unconditional one."""
    if not config.class_conditional:
        return 0
    if not config.data.num_classes:
        raise UserError(
            "class_conditional=True needs labels, but the data set has none (data.num_classes=0). "
            "Set --config.class_conditional=False, or add labels to the data."
        )
    return config.data.num_classes


def build_denoiser(config: ConfigDict) -> precond.Denoiser:
    """The network of a config: U-Net, LoRA as `lora.mode` says, and preconditioning."""
    check(config)
    unet = build_unet(config)
    if config.lora.mode != "baseline":
        adapter = lora.UCLoRA(
            rank=config.lora.rank, bases=config.lora.bases, widths=tuple(config.lora.widths)
        )
        unet = lora.attach(unet, sites=config.lora.sites, adapter=adapter, condition=CONDITION)
    return precond.Denoiser(unet, build_precond(config), num_labels(config))


def bypass_lora(denoiser: precond.Denoiser) -> precond.Denoiser:
    """The same network with its adapters off: the base alone, with the same variables."""
    if not isinstance(denoiser.model, lora.Adapted):
        return denoiser
    return denoiser.clone(model=denoiser.model.clone(enabled=False))


def init_variables(config: ConfigDict, denoiser: precond.Denoiser, key: Key) -> Variables:
    """Fresh variables {'params', optional 'buffers'} of a denoiser."""
    size = (config.data.image_size, config.data.image_size, config.data.channels)
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    variables = denoiser.init({"params": key}, jnp.zeros((1, *size)), jnp.ones(1), labels)
    return {k: v for k, v in variables.items() if k in ("params", "buffers")}


class Objective(NamedTuple):
    """A training loss in two parts: what it draws at random, and its value given the draws."""

    draw: Callable[[Key, tuple[int, ...]], PyTree]
    loss: Callable[..., tuple[Images, jax.Array]]


def build_objective(config: ConfigDict, denoiser: precond.Denoiser) -> Objective:
    """The training objective of a config.

    `draw(key, shape)` gives sigma [B], the augmentation's draws, unit noise and the key of the dropout,
    each from a key of its own; `loss(variables, images, labels, draws, train)` gives the loss per
    pixel [B, H, W, C] and sigma [B].
    """
    draw_sigma, weighted = _loss_parts(config, denoiser.precond)
    augment_p = config.augment.p
    feed_augment_labels = augment_p > 0 and config.model.augment_dim > 0
    base_frozen = config.train.freeze_base

    def draw(key: Key, shape: tuple[int, ...]) -> PyTree:
        k_sigma, k_augment, k_noise, k_dropout = jax.random.split(key, 4)
        return {
            "sigma": draw_sigma(k_sigma, shape[0]),
            "augment": augmentation.draw(k_augment, shape[0], p=augment_p),
            "noise": jax.random.normal(k_noise, shape),
            "dropout": k_dropout,
        }

    def loss(
        variables: Variables, images: Images, labels: Labels | None, draws: PyTree, train: bool
    ) -> tuple[Images, jax.Array]:
        augment_labels = None
        if augment_p > 0:
            images, augment_labels = augmentation.augment(images, draws["augment"])

        def denoise(x: Images, sigma: jax.Array) -> Images:
            return denoiser.apply(
                variables,
                x,
                sigma,
                labels,
                augment_labels if feed_augment_labels else None,
                train and not base_frozen,  # a frozen base stays in evaluation mode
                rngs={"dropout": draws["dropout"]},
            )

        return weighted(denoise, images, draws["sigma"], draws["noise"]), draws["sigma"]

    return Objective(draw, loss)


def _loss_parts(config: ConfigDict, pre: precond.Precond) -> tuple[Callable, Callable]:
    """(draw of sigma, loss) that belong to a preconditioning."""
    if config.precond.name == "vp":
        draw = functools.partial(
            losses.vp_sigma, beta_d=pre.beta_d, beta_min=pre.beta_min, epsilon_t=pre.epsilon_t
        )
        return draw, losses.vp_loss
    if config.precond.name == "ve":
        draw = functools.partial(losses.ve_sigma, sigma_min=pre.sigma_min, sigma_max=pre.sigma_max)
        return draw, losses.ve_loss
    if config.precond.name == "iddpm":
        levels = pre.levels()[:-1]
        return functools.partial(losses.iddpm_sigma, levels=levels), losses.vp_loss
    return losses.edm_sigma, functools.partial(losses.edm_loss, sigma_data=pre.sigma_data)


def build_sampler(config: ConfigDict, denoiser: precond.Denoiser) -> Callable[..., Images]:
    """The sampler of `config.sampler`, within the range of noise levels the network supports.

    Raises:
        UserError: settings that define no grid, before anything is compiled.
    """
    s = config.sampler
    common = {
        "num_steps": s.num_steps,
        "sigma_min": max(s.sigma_min, denoiser.sigma_min),
        "sigma_max": min(s.sigma_max, denoiser.sigma_max),
        "rho": s.rho,
        "s_churn": s.s_churn,
        "s_min": s.s_min,
        "s_max": s.s_max,
        "s_noise": s.s_noise,
        "round_sigma": denoiser.round_sigma,
    }
    schedules.check_steps(s.num_steps, s.sigma_min, s.sigma_max, s.rho)
    if s.name == "edm":
        return functools.partial(samplers.edm_sampler, **common)
    own = ("solver", "discretization", "schedule", "scaling", "alpha")
    return functools.partial(samplers.ablation_sampler, **common, **{k: s[k] for k in own})


def apply_function(denoiser: precond.Denoiser) -> Callable[..., Images]:
    """(variables, x, sigma, class_labels) -> D(x; sigma), for sampling and evaluation."""

    def apply(variables: Variables, x: Images, sigma: jax.Array, labels: Labels | None) -> Images:
        return denoiser.apply(variables, x, sigma, labels)

    return apply


def forward_flops(config: ConfigDict, denoiser: precond.Denoiser) -> float:
    """Floating-point operations of one evaluation per image, as XLA counts them (nothing is compiled)."""
    shapes = jax.eval_shape(lambda: init_variables(config, denoiser, jax.random.key(0)))
    size = (1, config.data.image_size, config.data.image_size, config.data.channels)
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    call = jax.jit(lambda variables, x: denoiser.apply(variables, x, jnp.ones(()), labels))
    lowered = call.lower(shapes, jax.ShapeDtypeStruct(size, jnp.float32))
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form: lists become tuples, fields that are newer take their defaults.

    Raises:
        UserError: a field that this version does not have.
    """
    config = default_config()
    unknown = _update(config, saved, "")
    if unknown:
        raise UserError(
            f"The saved config has fields that this version does not know: {', '.join(unknown)}. "
            "It was written by another version; use that one."
        )
    return config


def _update(config: ConfigDict, saved: dict[str, Any], prefix: str) -> list[str]:
    unknown = []
    for key, value in saved.items():
        if key not in config:
            unknown.append(prefix + key)
        elif isinstance(value, dict):
            unknown += _update(config[key], value, f"{prefix}{key}.")
        else:
            config[key] = tuple(value) if isinstance(value, list) else value
    return unknown
