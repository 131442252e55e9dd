"""Networks from configs and from the plain architectures that checkpoints carry, and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Key, Labels, Variables
from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion import precond
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import DTYPES, PRECONDS, VARIANTS, check, choose
from lora_diffusion_jax.models.adm_unet import ADMUNet
from lora_diffusion_jax.models.blocks import REMAT
from lora_diffusion_jax.models.song_unet import SongUNet

CONDITION = "map"  # path of the U-Nets' mapping network: its output conditions UC-LoRA

SITES = r".*/(qkv|proj)"

Architecture = dict[str, Any]  # plain JSON types; the fields of `interop.architecture`


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the images."""
    data = config.data
    return data.image_size, data.image_width or data.image_size, data.channels


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


def architecture_from_config(config: ConfigDict) -> Architecture:
    """The plain description of a config's network, with the fields that `interop.architecture` lists.

    Raises:
        UserError: the image size is not known.
    """
    model, data = config.model, config.data
    if not (data.image_size and data.channels):
        raise UserError(
            "The image size is not known: set data.image_size and data.channels, or name a data set "
            "(data.name or data.path) that can be opened."
        )
    mode = config.lora.mode
    fields = ("rank", "bases", "widths")
    return {
        "precond": config.precond.name,
        "precond_args": (
            {"sigma_data": config.precond.sigma_data} if config.precond.name == "edm" else {}
        ),
        "model": model.name,
        "img_resolution": data.image_size,
        "img_channels": data.channels,
        "label_dim": num_labels(config),
        "augment_dim": model.augment_dim,
        "model_channels": model.channels,
        "channel_mult": list(model.channel_mult),
        "channel_mult_emb": model.channel_mult_emb,
        "num_blocks": model.num_blocks,
        "attn_resolutions": list(model.attn_resolutions),
        "dropout": model.dropout,
        "label_dropout": model.label_dropout,
        **VARIANTS[model.name],
        "use_fp16": False,
        "use_affine": mode != "only_lora",
        "lora": None if mode == "baseline" else {f: _plain(config.lora[f]) for f in fields},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def config_from_architecture(architecture: Architecture) -> ConfigDict:
    """The inverse of `architecture_from_config`, all else being the base config's.

    Raises:
        UserError: the network has a property that no config can say.
    """
    config, a = default_config(), architecture
    unusual = {k: a[k] for k, v in VARIANTS[a["model"]].items() if a[k] != v}
    constants = {k: v for k, v in a["precond_args"].items() if k != "sigma_data"}
    usual = vars(PRECONDS[a["precond"]]())
    unusual |= {k: v for k, v in constants.items() if usual[k] != v}
    if unusual:
        raise UserError(
            f"The checkpoint is a {a['model']} network with {a['precond']} preconditioning, but has "
            f"{', '.join(f'{k}={v}' for k, v in unusual.items())}, which no config expresses. Build it "
            "from Python with factory.denoiser_from_architecture instead."
        )
    config.class_conditional = a["label_dim"] > 0
    config.precond.name = a["precond"]
    config.precond.sigma_data = float(a["precond_args"].get("sigma_data", 0.5))
    config.data.image_size = a["img_resolution"]
    config.data.channels = a["img_channels"]
    config.data.num_classes = a["label_dim"]
    config.model.name = a["model"]
    config.model.channels = a["model_channels"]
    for field in ("channel_mult", "attn_resolutions"):
        config.model[field] = tuple(a[field])
    for field in ("channel_mult_emb", "num_blocks", "augment_dim"):
        config.model[field] = a[field]
    for field in ("dropout", "label_dropout"):
        config.model[field] = float(a[field])
    config.augment.p = 0.12 if a["augment_dim"] == 9 else 0.0
    _set_lora(config, a)
    return config


def _set_lora(config: ConfigDict, architecture: Architecture) -> None:
    adapters = architecture["lora"]
    if adapters is None:
        config.lora.mode = "baseline"
        if not architecture["use_affine"]:
            raise UserError("The checkpoint has neither scale-and-shift nor LoRA; no mode is that.")
        return
    config.lora.mode = "with_lora" if architecture["use_affine"] else "only_lora"
    config.lora.rank, config.lora.bases = adapters["rank"], adapters["bases"]
    config.lora.widths = tuple(adapters["widths"])


def denoiser_from_architecture(
    architecture: Architecture,
    variables: Variables | None = None,
    *,
    dtype: str = "float32",
    remat: str = "none",
    sites: str = SITES,
) -> precond.Denoiser:
    """Builds the network that an architecture describes: U-Net, LoRA, preconditioning.

    Args:
        architecture: see `architecture_from_config`.
        variables: of a checkpoint, which for iDDPM holds the table of noise levels.
        dtype: of the computation: float32, bfloat16 or float16; parameters are float32.
        remat: what the backward pass computes again, see `models.blocks.REMAT`.
        sites: pattern of the layers that receive LoRA.
    """
    a = architecture
    preconditioning = PRECONDS[a["precond"]](**a["precond_args"])
    common = {
        "resolution": a["img_resolution"],
        "img_channels": a["img_channels"],
        "out_channels": a["img_channels"] * preconditioning.out_factor,
        "channel_mult": tuple(a["channel_mult"]),
        "attn_resolutions": tuple(a["attn_resolutions"]),
        "dtype": choose("dtype", dtype, DTYPES),
        "remat": choose("train.remat", remat, REMAT),
    }
    same = ("label_dim", "augment_dim", "model_channels", "channel_mult_emb", "num_blocks")
    common |= {k: a[k] for k in (*same, "dropout", "label_dropout", "use_affine")}
    if a["model"] == "adm":
        unet = ADMUNet(**common)
    else:
        unet = SongUNet(
            **common,
            embedding=a["embedding_type"],
            encoder=a["encoder_type"],
            channel_mult_noise=a["channel_mult_noise"],
            resample_filter=tuple(a["resample_filter"]),
        )
    if a["lora"] is not None:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in a["lora"].items()}
        unet = lora.attach(unet, sites=sites, adapter=lora.UCLoRA(**settings), condition=CONDITION)
    return precond.Denoiser(unet, preconditioning, a["label_dim"])


def build_denoiser(config: ConfigDict, variables: Variables | None = None) -> precond.Denoiser:
    """The network of a config: U-Net, LoRA as `lora.mode` says, and preconditioning."""
    check(config)
    denoiser = denoiser_from_architecture(
        architecture_from_config(config),
        variables,
        dtype=config.dtype,
        remat=config.train.remat,
        sites=config.lora.sites,
    )
    return denoiser.clone(precond=build_precond(config.precond))


def build_precond(group: ConfigDict) -> precond.Precond:
    """The preconditioning of `config.precond`, with the fields of the group that it has."""
    chosen = PRECONDS[group.name]
    fields = {field.name for field in dataclasses.fields(chosen)}
    return chosen(**{k: v for k, v in group.items() if k in fields})


def bypass_lora(denoiser: precond.Denoiser) -> precond.Denoiser:
    """The same network with its adapters off: the base alone, with the same variables."""
    if not isinstance(denoiser.model, lora.Adapted):
        return denoiser
    return denoiser.clone(model=denoiser.model.clone(enabled=False))


def fold_lora(
    denoiser: precond.Denoiser,
    variables: Variables,
    sigma: float,
    class_labels: Labels | None = None,
) -> tuple[precond.Denoiser, Variables]:
    """A network without adapters that equals this one at one noise level and class label.

    W + sum_i omega_i(condition) B_i A_i replaces each adapted W (`lora.fold`).

    Args:
        denoiser: with LoRA attached.
        variables: its variables.
        sigma: the noise level.
        class_labels: one label [1, num_classes]; None for zeros.

    Raises:
        UserError: the network has no adapters.
    """
    if not isinstance(denoiser.model, lora.Adapted):
        raise UserError("This network has no adapters to fold.")
    size = denoiser.model.module.resolution, denoiser.model.module.img_channels
    x = jnp.zeros((1, size[0], size[0], size[1]))
    omegas = lora.composition_weights(denoiser, variables, x, sigma, class_labels)
    base = denoiser.clone(model=denoiser.model.module)
    return base, {**variables, "params": lora.fold(variables["params"], omegas)}


def init_variables(config: ConfigDict, denoiser: precond.Denoiser, key: Key) -> Variables:
    """Fresh variables {'params', optional 'buffers'} of a denoiser."""
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    x = jnp.zeros((1, *image_shape(config)))
    variables = denoiser.init({"params": key}, x, jnp.ones(1), labels)
    return {k: v for k, v in variables.items() if k in ("params", "buffers")}


def forward_flops(config: ConfigDict, denoiser: precond.Denoiser) -> float:
    """Floating-point operations of one evaluation per image, as XLA counts them (nothing is compiled)."""
    shapes = jax.eval_shape(lambda: init_variables(config, denoiser, jax.random.key(0)))
    size = (1, *image_shape(config))
    labels = jnp.zeros((1, num_labels(config))) if num_labels(config) else None
    call = jax.jit(lambda variables, x: denoiser.apply(variables, x, jnp.ones(()), labels))
    lowered = call.lower(shapes, jax.ShapeDtypeStruct(size, jnp.float32))
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))
