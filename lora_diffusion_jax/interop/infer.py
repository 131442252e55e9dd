"""What network a checkpoint holds: from the snapshot's recorded arguments, or from its shapes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop.architecture import Architecture, check_architecture
from lora_diffusion_jax.interop.names import StateDict
from lora_diffusion_jax.readers.machine import shorten, show
from lora_diffusion_jax.readers.pickles import ModuleNode

# Official class -> our name, and its constants: official attribute -> our argument.
PRECONDS = {
    "EDMPrecond": (
        "edm",
        {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "sigma_data": "sigma_data"},
    ),
    "VPPrecond": (
        "vp",
        {"beta_d": "beta_d", "beta_min": "beta_min", "M": "num_steps", "epsilon_t": "epsilon_t"},
    ),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": ("iddpm", {"C_1": "c_1", "C_2": "c_2", "M": "num_steps"}),
}

_ENDS = ("img_resolution", "in_channels", "out_channels", "label_dim")
_COMMON = {  # official defaults of both networks: what an argument that was not given means
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "dropout": 0.10,
    "label_dropout": 0,
}
_DEFAULTS = {
    "SongUNet": {
        **_COMMON,
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        **_COMMON,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
_ADM_FIXED = {  # what SongUNet calls these things in DhariwalUNet, which has no choice
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}


def infer_architecture(ema: ModuleNode) -> Architecture:
    """The architecture of a snapshot's network, with the fields that `architecture` lists.

    Raises:
        UserError: a class or an option that this project does not have; it is named.
    """
    if ema.class_name not in PRECONDS:
        raise UserError(
            f"The snapshot's network is a {shorten(ema.class_name)}; "
            f"known are {', '.join(PRECONDS)}."
        )
    precond, names = PRECONDS[ema.class_name]
    model = ema.children.get("model")
    if model is None or model.class_name not in _DEFAULTS:
        found = "nothing" if model is None else f"a {shorten(model.class_name)}"
        raise UserError(f"The snapshot's model is {found}; known are {' and '.join(_DEFAULTS)}.")
    weights = ema.state_dict()
    recorded = _recorded(model) if model.init_kwargs is not None else _from_shapes(ema, weights)
    architecture = {
        "precond": precond,
        "precond_args": {
            ours: ema.attributes[theirs]
            for theirs, ours in names.items()
            if theirs in ema.attributes
        },
        "model": _model_name(model.class_name, recorded),
        "img_resolution": recorded["img_resolution"],
        "img_channels": recorded["in_channels"],
        **{k: v for k, v in recorded.items() if k not in ("img_resolution", *_ENDS[1:3])},
        **_attributes_in_force(ema, recorded),
        "use_affine": any(name.endswith(".affine.weight") for name in weights),
        "lora": _lora(ema, weights),
    }
    if architecture["precond_args"].get("sigma_max") == math.inf:
        del architecture["precond_args"]["sigma_max"]  # no bound, which JSON cannot say
    _check_modules(model)
    return check_architecture(architecture)


def _model_name(class_name: str, recorded: Mapping[str, Any]) -> str:
    if class_name == "DhariwalUNet":
        return "adm"
    standard = recorded["embedding_type"] == "positional" and recorded["encoder_type"] == "standard"
    return "ddpmpp" if standard else "ncsnpp"


def _recorded(model: ModuleNode) -> dict[str, Any]:
    """The constructor's arguments: given ones, else the official defaults."""
    defaults = _DEFAULTS[model.class_name]
    given = dict(zip((*_ENDS, *defaults), model.init_args, strict=False)) | model.init_kwargs
    unknown = [name for name in given if name not in _ENDS and name not in defaults]
    if unknown or len(model.init_args) > len(_ENDS):
        what = ", ".join(shorten(str(name)) for name in unknown) or "positional arguments"
        raise UserError(f"The snapshot's {model.class_name} was made with {what}, unknown here.")
    missing = [name for name in _ENDS if name not in given and name != "label_dim"]
    if missing:
        raise UserError(f"The snapshot's {model.class_name} was made without {', '.join(missing)}.")
    fixed = _ADM_FIXED if model.class_name == "DhariwalUNet" else {}
    return {"label_dim": 0, **fixed, **defaults, **given}


def _from_shapes(ema: ModuleNode, weights: StateDict) -> dict[str, Any]:
    """The same arguments from the tensors' names and shapes, where none were recorded."""
    song = ema.children["model"].class_name == "SongUNet"
    try:
        levels = _levels(weights)
        top = max(levels)
        width, channels = weights[f"model.enc.{top}x{top}_conv.weight"].shape[:2]
        emb, noise = weights["model.map_layer0.weight"].shape
        base = width if song else noise
        fixed = _song_options(weights, noise // base) if song else _ADM_FIXED
        return {
            "img_resolution": top,
            "in_channels": channels,
            "out_channels": channels,
            "label_dim": _inputs(weights, "model.map_label.weight"),
            "augment_dim": _inputs(weights, "model.map_augment.weight"),
            "model_channels": base,
            "channel_mult": [_level_width(weights, r) // base for r in levels],
            "channel_mult_emb": emb // base,
            "num_blocks": levels[top],
            "attn_resolutions": [
                r for r in levels if f"model.enc.{r}x{r}_block0.norm2.weight" in weights
            ],
            **fixed,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            "The snapshot records no arguments of its network, and its tensors do not show them: "
            f"{shorten(str(error))}."
        ) from error


def _levels(weights: StateDict) -> dict[int, int]:
    """Height -> number of blocks of each level of the encoder, finest first."""
    counts: dict[int, int] = {}
    for name in weights:
        part = name.split(".")[2] if name.startswith("model.enc.") else ""
        if "_block" in part and name.endswith(".norm0.weight"):
            height = int(part.split("x")[0])
            counts[height] = counts.get(height, 0) + 1
    return dict(sorted(counts.items(), reverse=True))


def _level_width(weights: StateDict, height: int) -> int:
    return weights[f"model.enc.{height}x{height}_block0.conv0.weight"].shape[0]


def _inputs(weights: StateDict, name: str) -> int:
    return weights[name].shape[1] if name in weights else 0


def _song_options(weights: StateDict, channel_mult_noise: int) -> dict[str, Any]:
    names = " ".join(weights)
    encoder = "residual" if "_aux_residual." in names else "skip" if "_aux_skip." in names else ""
    filters = [value for name, value in weights.items() if name.endswith(".resample_filter")]
    return {
        "embedding_type": "fourier" if "model.map_noise.freqs" in weights else "positional",
        "channel_mult_noise": channel_mult_noise,
        "encoder_type": encoder or "standard",
        "decoder_type": "skip" if "_aux_up." in names else "standard",
        "resample_filter": _taps(filters[0]) if filters else [1, 1],
    }


def _taps(kernel: np.ndarray) -> list[int]:
    """[1, 3, 3, 1] from the normalised outer product that is stored."""
    row = kernel.reshape(kernel.shape[-2:]).sum(axis=0)
    return [round(float(tap)) for tap in row / row.min()]


def _attributes_in_force(ema: ModuleNode, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that act through attributes, which may have been changed after construction."""
    model = ema.children["model"]
    rates = {
        node.attributes["dropout"]
        for _, node in model.walk()
        if node.class_name == "UNetBlock" and type(node.attributes.get("dropout")) in (int, float)
    }
    if len(rates) > 1:
        raise UserError(f"The snapshot's blocks have different dropout rates {sorted(rates)}.")
    dropout = rates.pop() if rates else recorded.get("dropout")
    label_dropout = model.attributes.get("label_dropout", recorded.get("label_dropout"))
    use_fp16 = ema.attributes.get("use_fp16")
    found = {"dropout": dropout, "label_dropout": label_dropout, "use_fp16": use_fp16}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(f"The snapshot does not record {', '.join(missing)} of its network.")
    return found


def _lora(ema: ModuleNode, weights: StateDict) -> dict[str, Any] | None:
    """Rank, bases and widths of the adapters from the shapes of the first one."""
    suffix = ".lora_down.weight"
    sites = [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]
    if not sites:
        return None
    for name, node in ema.walk():
        scale = node.attributes.get("scale", 1.0)
        if node.class_name == "LoraInjectedConv" and not (
            type(scale) in (int, float) and scale == 1
        ):
            raise UserError(
                f"The snapshot scales the LoRA of {shorten(name)} by {show(scale)}; here it is 1."
            )
    head = f"{sites[0]}.comp_weights"
    widths = []
    while f"{head}.{len(widths)}.0.weight" in weights:
        widths.append(weights[f"{head}.{len(widths)}.0.weight"].shape[0])
    last = f"{head}.{len(widths)}.weight"
    if last not in weights or not weights[last].shape[0]:
        raise UserError(f"The snapshot has {sites[0]}{suffix}, but no {last}.")
    bases = weights[last].shape[0]
    inner = weights[f"{sites[0]}{suffix}"].shape[0]
    return {"rank": inner // bases, "bases": bases, "widths": widths}


def _check_modules(model: ModuleNode) -> None:
    """Refuses layers that were built otherwise than the official networks build them."""
    song = model.class_name == "SongUNet"
    for name, node in model.walk():
        for key, value in _as_official(name, node, song).items():
            found = node.attributes.get(key, value)
            if found != value:
                raise UserError(
                    f"The snapshot's model.{shorten(name)} has {key} = {show(found)}; "
                    f"{model.class_name} has {value} here."
                )


def _as_official(name: str, node: ModuleNode, song: bool) -> dict[str, Any]:
    """The attributes of a layer that have but one value in the official networks."""
    if node.class_name == "UNetBlock":
        width = node.attributes.get("out_channels")
        heads = 1 if song or type(width) is not int else width // 64
        return {
            "skip_scale": math.sqrt(0.5) if song else 1,
            "adaptive_scale": not song,
            "num_heads": heads if "qkv" in node.children else 0,
        }
    if node.class_name == "GroupNorm" and "weight" in node.params:
        own = song and ".comp_weights." not in name  # the adapters' norms keep the default
        groups = min(32, node.params["weight"].size // 4)
        return {"eps": 1e-6 if own else 1e-5, "num_groups": groups}
    if node.class_name == "Conv2d":
        return {"fused_resample": name.endswith("_aux_residual")}
    if node.class_name == "PositionalEmbedding":
        return {"endpoint": song, "max_positions": 10000}
    return {}
