"""The config of a network that a file holds, from the arguments that an official snapshot records."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion.precond import PRECONDS
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.models import NETWORKS
from lora_diffusion_jax.readers.pickles import ModuleNode

# Official class of the preconditioning -> its name here, and the official names of its constants.
_PRECONDS = {
    "EDMPrecond": ("edm", ("sigma_min", "sigma_max", "sigma_data")),
    "VPPrecond": ("vp", ("beta_d", "beta_min", "M", "epsilon_t")),
    "VEPrecond": ("ve", ("sigma_min", "sigma_max")),
    "iDDPMPrecond": ("iddpm", ("C_1", "C_2", "M")),
}
_RENAMED = {"M": "num_steps", "C_1": "c_1", "C_2": "c_2"}  # official name of a constant -> ours

_FIELDS = {  # official argument of a network -> our field
    "img_resolution": "data.image_size",
    "in_channels": "data.channels",
    "label_dim": "data.num_classes",
    "augment_dim": "model.augment_dim",
    "model_channels": "model.channels",
    "channel_mult": "model.channel_mult",
    "channel_mult_emb": "model.channel_mult_emb",
    "num_blocks": "model.num_blocks",
    "attn_resolutions": "model.attn_resolutions",
    "dropout": "model.dropout",
    "label_dropout": "model.label_dropout",
    "embedding_type": "model.embedding",
    "channel_mult_noise": "model.channel_mult_noise",
    "encoder_type": "model.encoder",
    "resample_filter": "model.resample_filter",
}
_REQUIRED = ("img_resolution", "in_channels")
_IGNORED = ("out_channels", "decoder_type")  # the tensors' names and shapes show what they decide
# Official class -> the network of that class here, whose defaults are the official ones.
_NETWORKS = {"SongUNet": "ddpmpp", "DhariwalUNet": "adm"}


def infer_config(ema: ModuleNode) -> ConfigDict:
    """The config of a snapshot's network; fields that a snapshot does not record have their defaults.

    Raises:
        UserError: the network has a class or an option that this project does not have; it is named.
    """
    model = ema.children.get("model")
    if ema.class_name not in _PRECONDS or model is None or model.class_name not in _NETWORKS:
        inside = printable(model.class_name) if model else "nothing"
        raise UserError(
            f"The snapshot's network is {printable(ema.class_name)} of {inside}; expected "
            f"{', '.join(_PRECONDS)} of {' or '.join(_NETWORKS)}."
        )
    _check_modules(model)
    weights = ema.state_dict()
    precond, constants = _PRECONDS[ema.class_name]
    return config_from_official(
        model.class_name,
        {**_arguments(model), **_rates(model)},
        precond,
        {_RENAMED.get(k, k): ema.attributes[k] for k in constants if k in ema.attributes},
        adapters=_adapters(ema, weights),
        use_affine=any(name.endswith(".affine.weight") for name in weights),
    )


def config_from_format_1(description: Mapping[str, Any]) -> ConfigDict:
    """The config of an export of format 1, which described its network in official words.

    Raises:
        UserError: a value is invalid.
        KeyError, TypeError, AttributeError: the description is damaged.
    """
    network = "DhariwalUNet" if description["model"] == "adm" else "SongUNet"
    arguments = {**description, "in_channels": description["img_channels"]}
    return config_from_official(
        network,
        {name: arguments[name] for name in _known(network)},
        description["precond"],
        description["precond_args"],
        adapters=description["lora"],
        use_affine=description["use_affine"],
    )


def config_from_official(
    network: str,
    arguments: Mapping[str, Any],
    precond: str,
    constants: Mapping[str, Any],
    *,
    adapters: Mapping[str, Any] | None,
    use_affine: bool = True,
) -> ConfigDict:
    """The config of a network that is described in official words.

    Args:
        network: SongUNet or DhariwalUNet.
        arguments: of its constructor, by their official names; others have the official defaults.
        precond: the preconditioning, in our words.
        constants: of the preconditioning, fields of `config.precond`.
        adapters: rank, bases and widths of UC-LoRA; None for a network without.
        use_affine: whether the blocks have their scale-and-shift.

    Raises:
        UserError: a value has the wrong type, or an option is unknown here.
    """
    config = default_config()
    config.model.name = _NETWORKS[network]
    song = arguments.get("embedding_type"), arguments.get("encoder_type")
    if "fourier" in song or "residual" in song:
        config.model.name = "ncsnpp"
    config.precond.name = precond
    config.lora.mode = ("with_lora" if use_affine else "only_lora") if adapters else "baseline"
    usual = _defaults(_NETWORKS[network])
    for name in _known(network):
        field = _FIELDS[name]
        _assign(config, field, arguments.get(name, usual.get(field.split(".")[1])), name)
    for group, values in (("precond", constants), ("lora", adapters or {})):
        for name, value in values.items():
            _assign(config, f"{group}.{name}", value, name)
    levels = [config.data.image_size >> k for k in range(len(config.model.channel_mult))]
    heights = config.model.attn_resolutions
    config.model.attn_resolutions = tuple(
        size for size in heights if size in levels
    )  # others do nothing
    if adapters is None and not use_affine:
        raise UserError("No lora.mode describes a network with neither scale-and-shift nor LoRA.")
    _clear_usual(config, "model", _defaults(config.model.name))
    _clear_usual(config, "precond", vars(PRECONDS[precond]()))
    config.class_conditional = config.data.num_classes > 0
    config.augment.p = 0.12 if config.model.augment_dim == 9 else 0.0  # the official setting
    return config


def _defaults(network: str) -> dict[str, Any]:
    """The settings of a network of `NETWORKS` by field, but for the sizes of its images."""
    return vars(NETWORKS[network](None, None, None))


def _known(network: str) -> list[str]:
    """The official arguments of a network's constructor that are settings here."""
    own = _defaults(_NETWORKS[network])
    return [k for k, field in _FIELDS.items() if k in _REQUIRED or field.split(".")[1] in own]


def _assign(config: ConfigDict, field: str, value: Any, name: str) -> None:
    """Sets a field to a value from a file, which calls it `name`."""
    group, _, leaf = field.partition(".")
    numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
    try:
        if not numbers and type(value) not in (bool, int, float, str):
            raise TypeError
        config[group][leaf] = tuple(value) if numbers else value
    except TypeError:
        raise UserError(
            f"The network has {name} = {printable(value)}, which this project does not know."
        ) from None


def _clear_usual(config: ConfigDict, group: str, usual: Mapping[str, Any]) -> None:
    """Resets to None the optional fields that state what the network has without them."""
    for field, default in default_config()[group].items():
        if default is None and field in usual and config[group][field] == usual[field]:
            config[group][field] = None


def _arguments(model: ModuleNode) -> dict[str, Any]:
    """The recorded arguments of the constructor."""
    given = model.init_kwargs
    if given is None or model.init_args:
        raise UserError(
            f"The snapshot does not record the arguments of its {model.class_name} by name."
        )
    known = _known(model.class_name)
    unknown = [name for name in given if name not in (*known, *_IGNORED)]
    if unknown:
        listed = ", ".join(printable(name) for name in unknown[:8])
        raise UserError(f"The snapshot's {model.class_name} was built with {listed}, unknown here.")
    if missing := [name for name in _REQUIRED if name not in given]:
        raise UserError(f"The snapshot does not record {', '.join(missing)} of its network.")
    return {name: given[name] for name in known if name in given}


def _rates(model: ModuleNode) -> dict[str, Any]:
    """Dropout rates, which act through attributes that may have changed after construction."""
    rates = {
        node.attributes["dropout"]
        for _, node in model.walk()
        if node.class_name == "UNetBlock" and type(node.attributes.get("dropout")) in (int, float)
    }
    if len(rates) > 1:
        raise UserError(f"The snapshot's blocks have different dropout rates: {sorted(rates)}.")
    in_force = {"dropout": rates.pop()} if rates else {}
    if "label_dropout" in model.attributes:
        in_force["label_dropout"] = model.attributes["label_dropout"]
    return in_force


def _adapters(ema: ModuleNode, weights: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Rank, bases and widths of the adapters, from the shapes of the first one."""
    suffix = ".lora_down.weight"
    sites = [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]
    if not sites:
        return None
    for name, node in ema.walk():
        scale = node.attributes.get("scale", 1)
        if node.class_name == "LoraInjectedConv" and scale != 1:
            raise UserError(
                f"The snapshot scales the LoRA of {printable(name)} by {printable(scale)}; here it is 1."
            )
    head = f"{sites[0]}.comp_weights"
    widths: list[int] = []
    while (weight := weights.get(f"{head}.{len(widths)}.0.weight")) is not None:
        widths.append(weight.shape[0])
    last = weights.get(f"{head}.{len(widths)}.weight")
    if last is None or not last.shape[0]:
        raise UserError(f"The snapshot has {printable(sites[0] + suffix)}, but no composition MLP.")
    bases = last.shape[0]
    return {"rank": weights[sites[0] + suffix].shape[0] // bases, "bases": bases, "widths": widths}


def _check_modules(model: ModuleNode) -> None:
    """Raises UserError for a layer that was built otherwise than the official networks build it."""
    song = model.class_name == "SongUNet"
    for name, node in model.walk():
        for key, value in _official_attributes(name, node, song).items():
            found = node.attributes.get(key, value)
            if found != value:
                raise UserError(
                    f"The snapshot's model.{printable(name)} has {key} = {printable(found)}; "
                    f"{model.class_name} has {value} here."
                )


def _official_attributes(name: str, node: ModuleNode, song: bool) -> dict[str, Any]:
    """The attributes of a layer that have only one value in the official networks."""
    if node.class_name == "UNetBlock":
        width = node.attributes.get("out_channels")
        heads = 1 if song or type(width) is not int else width // 64
        return {
            "skip_scale": math.sqrt(0.5) if song else 1,
            "adaptive_scale": not song,
            "num_heads": heads if "qkv" in node.children else 0,
        }
    if node.class_name == "GroupNorm" and "weight" in node.params:
        own = song and ".comp_weights." not in name  # the adapters' norms keep PyTorch's default
        groups = min(32, node.params["weight"].size // 4)
        return {"eps": 1e-6 if own else 1e-5, "num_groups": groups}
    if node.class_name == "Conv2d":
        return {"fused_resample": name.endswith("_aux_residual")}
    if node.class_name == "PositionalEmbedding":
        return {"endpoint": song, "max_positions": 10000}
    return {}
