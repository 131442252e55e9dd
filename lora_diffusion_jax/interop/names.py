"""Our variables under the official names and in the official layouts, by rule.

    params/model/enc/32x32_block0/qkv/lora/down/kernel [in, out]
        <-> model.enc.32x32_block0.qkv.lora_down.weight [out, in, 1, 1]

The rule reads paths alone, and shapes come from the network itself: a new network needs no edit here. What
improved-diffusion names otherwise lies in `openai_names`; there is no `model.` before its names, and it has
qkv and proj as convolutions over one axis, and the class embedding as a table [classes, width].
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.diffusion.precond import IDDPM
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser, variable_shapes
from lora_diffusion_jax.factory.pretrained import mismatch
from lora_diffusion_jax.interop.openai_names import official_layers
from lora_diffusion_jax.paths import ADAPTER

VariablePath = tuple[str, ...]  # its collection first
Shape = tuple[int, ...]
StateDict = Mapping[str, np.ndarray]  # arrays by official names

_RULES = (  # applied in turn to the path below its collection
    (r"^model/map/", "model/map_"),
    (rf"/{ADAPTER}/composition/dense_(\d+)/", r"/comp_weights/\1/0/"),
    (rf"/{ADAPTER}/composition/norm_(\d+)/", r"/comp_weights/\1/1/"),
    (rf"/{ADAPTER}/composition/", "/comp_weights/"),
    (rf"/{ADAPTER}/bias$", "/bias"),
    (rf"/{ADAPTER}/", "/lora_"),
    (r"/(kernel|scale)$", "/weight"),
)
_POINTWISE = ("qkv", "proj", "skip", "down", "up")  # matrices here, 1x1 convolutions officially


def is_openai(config: ConfigDict) -> bool:
    """Whether a config's network has improved-diffusion's names and layouts, or else EDM's."""
    return config.model.name == "improved"


def official_names(paths: Iterable[VariablePath], openai: bool) -> dict[VariablePath, str]:
    """The official name of each variable of a network.

    Officially `X.bias` of an adapted layer X belongs to its adapter; the layer's own are `X.conv.weight`
    and `X.conv.bias`. The composition MLP's last layer is numbered after the hidden ones.
    """
    paths = list(paths)
    places = official_layers(path[1:] for path in paths) if openai else {}
    sites = {path[: path.index(ADAPTER)] for path in paths if ADAPTER in path}
    hidden = {path[-2] for path in paths if "composition" in path and path[-1] == "scale"}
    names = {}
    for path in paths:
        leaf = ("conv", path[-1]) if path[:-1] in sites else (path[-1],)
        layer = next((path[1:end] for end in (5, 4, 3) if path[1:end] in places), ())
        below = path[1 + len(layer) : -1]
        name = "/".join((*places.get(layer, ()), *below, *leaf)).replace(
            "/dense_out/", f"/{len(hidden)}/"
        )
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        names[path] = name.replace("/", ".")
    return names


def to_official(path: VariablePath, value: np.ndarray, openai: bool) -> np.ndarray:
    """A variable in the official layout: kernels [out, in, h, w], matrices [out, in]."""
    if path[-1] != "kernel" or openai and path[-2] == "label":
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if openai and path[-2] in ("qkv", "proj"):
        return value.T[..., None]
    return value.T[..., None, None] if path[-2] in _POINTWISE else value.T


def from_official(path: VariablePath, value: np.ndarray, ndim: int, openai: bool) -> np.ndarray:
    """The inverse of `to_official`, for a variable of `ndim` axes."""
    if path[-1] != "kernel" or openai and path[-2] == "label":
        return value
    return value.transpose(2, 3, 1, 0) if ndim == 4 else value.reshape(value.shape[:2]).T


def rename(
    leaves: Mapping[VariablePath, Any], network: Iterable[VariablePath], openai: bool
) -> dict[str, np.ndarray]:
    """Some variables of a network in the official names and layouts.

    Args:
        leaves: the variables by path.
        network: the paths of all its variables, which decide the names.
        openai: see `is_openai`.
    """
    names = official_names(network, openai)
    return {
        names[path]: np.ascontiguousarray(to_official(path, np.asarray(value), openai))
        for path, value in leaves.items()
    }


def to_variables(
    state_dict: StateDict, config: ConfigDict, base: Variables | None = None
) -> Variables:
    """Official tensors as the variables {'params', optional 'buffers'} of a config's network.

    Args:
        state_dict: arrays by official names; their dtype is kept.
        config: of the network.
        base: variables of the base, for a state_dict of adapters alone.

    Raises:
        UserError: names the tensors that are missing, left over, or have other shapes.
    """
    (shapes, constants), openai = _expected(config), is_openai(config)
    if base is not None:
        leaves = traverse_util.flatten_dict(lora.split(base)[0])
        state_dict = {**rename(leaves, shapes, openai), **state_dict, **constants}
    names = official_names(shapes, openai)
    wanted = {name: value.shape for name, value in constants.items()}
    for path, name in names.items():
        wanted[name] = to_official(path, np.broadcast_to(np.float32(0), shapes[path]), openai).shape
    if problem := mismatch({k: np.shape(v) for k, v in state_dict.items()}, wanted):
        raise UserError(f"The checkpoint is not the network that its settings describe: {problem}.")
    for name, value in constants.items():
        if not np.allclose(np.asarray(state_dict[name], np.float64), value, rtol=1e-3):
            raise UserError(f"The checkpoint's {name} is not the one that its settings describe.")
    leaves = {
        path: np.ascontiguousarray(from_official(path, state_dict[name], len(shapes[path]), openai))
        for path, name in names.items()
    }
    return traverse_util.unflatten_dict(leaves)


def to_state_dict(variables: Variables, config: ConfigDict) -> dict[str, np.ndarray]:
    """The inverse of `to_variables`: arrays by official names.

    Raises:
        UserError: names the variables that are missing, left over, or have other shapes.
    """
    shapes, constants = _expected(config)
    leaves = traverse_util.flatten_dict(variables)
    found = {"/".join(path): np.shape(value) for path, value in leaves.items()}
    if problem := mismatch(found, {"/".join(path): shape for path, shape in shapes.items()}):
        raise UserError(f"These weights are not those of the config's network: {problem}.")
    return rename(leaves, leaves, is_openai(config)) | constants


def base_hash(variables: Variables) -> str:
    """SHA-256 of the base's tensors under the names they have in a network without LoRA, by EDM's rule.

    It is the same for a base and for a network with adapters on that base.
    """
    leaves = traverse_util.flatten_dict(lora.split(variables)[0])
    digest = hashlib.sha256()
    for name, value in sorted(rename(leaves, leaves, openai=False).items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _expected(config: ConfigDict) -> tuple[dict[VariablePath, Shape], dict[str, np.ndarray]]:
    """The shapes of a network's variables by path, and its official tensors that are constants here.

    The constants are the filters of resampling layers, and iDDPM's noise levels; improved-diffusion's
    state dicts have neither.
    """
    denoiser = build_denoiser(config)
    leaves = traverse_util.flatten_dict(variable_shapes(config, denoiser))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    if is_openai(config):
        return shapes, {}
    unet = getattr(denoiser.model, "module", denoiser.model)  # below the adapters
    taps = np.asarray(getattr(unet, "resample_filter", (1, 1)), np.float32)
    window = np.outer(taps, taps)[None, None] / np.square(taps.sum())
    constants: dict[str, np.ndarray] = {}
    for stage in {".".join(path[1:4]) for path in leaves}:  # model.enc.16x16_down
        if stage.endswith(("_down", "_up")):
            constants |= dict.fromkeys(
                (f"{stage}.conv0.resample_filter", f"{stage}.skip.resample_filter"), window
            )
        elif stage.endswith("_aux_residual"):
            constants[f"{stage}.resample_filter"] = window
    if isinstance(denoiser.precond, IDDPM):
        constants["u"] = denoiser.precond.levels()
    return shapes, constants
