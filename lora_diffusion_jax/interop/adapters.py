"""Adapters of any model as files of their own: in this project's format, and in that of PEFT.

The trees are those of `lora.split(params)[1]` for linen and of `lora.adapter_tree(model)` for nnx.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.files import disk_errors, write_text
from lora_diffusion_jax.interop.export import check_suffix, write_safetensors
from lora_diffusion_jax.lora.params import omega_of
from lora_diffusion_jax.paths import ADAPTER, list_adapters, list_sites
from lora_diffusion_jax.readers.safetensors import read_safetensors
from lora_diffusion_jax.untrusted import read_json

FORMAT = "lora_diffusion_jax/adapters/1"
# PEFT's names of a site's two matrices and their bias (its "checkpoint format", v0.20)
_PREFIX, _DOWN, _UP, _SHIFT = (
    "base_model.model.",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
)
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapters(path: str | Path, adapters: PyTree) -> None:
    """Writes adapters alone to a .safetensors file, each parameter by its path.

    Raises:
        UserError: the tree has no adapters or other parameters, or the file cannot be written.
    """
    path = check_suffix(path)
    flat = _flat(adapters)
    write_safetensors(path, {"/".join(k): v for k, v in flat.items()}, {"format": FORMAT})


def load_adapters(path: str | Path) -> PyTree:
    """Reads what `save_adapters` wrote; `lora.merge` or `lora.update_adapters` puts it into a model.

    Raises:
        UserError: the file is missing, corrupt or of another kind.
    """
    metadata, arrays = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file of another kind (format {printable(metadata.get('format'))}); "
            "expected one that save_adapters wrote. Those of --mode=export --adapters_only are for "
            "--mode=import --base=FILE."
        )
    tree: dict[tuple[str, ...], np.ndarray] = {tuple(k.split("/")): v for k, v in arrays.items()}
    if any(k[:i] in tree for k in tree for i in range(1, len(k))):
        raise UserError(f"{path} is corrupt: a parameter lies below another.")
    adapters = traverse_util.unflatten_dict(tree)
    _flat(adapters)
    return adapters


def save_peft(
    folder: str | Path,
    adapters: PyTree,
    omegas: Mapping[str, Any],
    conv1d: str | None = None,
) -> None:
    """Writes adapters under one fixed condition in PEFT's format, with alpha = r, so that its scale is 1.

    All bases of a site become one pair of matrices, with the composition weights in lora_A. Kernels of
    four axes are those of Conv2d. Those of three are Conv1d's [window, in, out], or those of a
    DenseGeneral that takes two axes, which are one axis of PEFT's Linear; a tree does not say which.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        adapters: the tree.
        omegas: site path -> composition weights [m] (or [1, m]); `lora.composition_weights` gives them.
        conv1d: regular expression for the whole paths of the sites that are 1-D convolutions, '' if none
            is; needed if a kernel has three axes.

    Raises:
        UserError: a kernel of three axes without `conv1d`; weights of other sites or
            sizes, or for several samples; or a file cannot be written.
    """
    flat, sites = _flat(adapters), list_sites(adapters)
    if sites != sorted(omegas):
        raise UserError(f"PEFT's format got weights for {sorted(omegas)}, the sites are {sites}.")
    pairs = {}
    for site in sites:
        dense = not _is_conv1d(flat, site, conv1d)
        pairs[site] = _pair(flat, site, omegas[site], joins_axes=dense)
    rank = max(down.shape[0] for down, _, _ in pairs.values())
    biased = any(np.any(shift) for _, _, shift in pairs.values())
    arrays = {}
    for site, (down, up, shift) in pairs.items():
        name = _PREFIX + site.replace("/", ".")
        arrays[name + _DOWN] = _padded(down, 0, rank)
        up = _padded(up, 1, rank)
        arrays[name + _UP] = up.reshape(*up.shape, *[1] * (down.ndim - 2))
        if biased:
            arrays[name + _SHIFT] = shift
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "lora_bias": biased,
        "target_modules": [site.replace("/", ".") for site in sites],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    folder = Path(folder)
    write_safetensors(folder / _WEIGHTS, arrays, {"format": "pt"})
    with disk_errors(folder):
        write_text(folder / _CONFIG, json.dumps(config, indent=2) + "\n")


def load_peft(folder: str | Path, adapters: PyTree) -> PyTree:
    """Reads LoRA in PEFT's format into adapters without a condition.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        adapters: fresh ones of lora.ClassLoRA(rank=r, num_classes=1), or with use_bias=True if the file
            has biases; they say the sites and shapes. The condition of every call is jnp.zeros(1, int).

    Returns:
        Such a tree with the file's values, alpha / r included. Ranks below r are filled up with zeros.

    Raises:
        UserError: the files are missing or corrupt, ask for more than LoRA, or do not fit the adapters.
    """
    folder = Path(folder)
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / _CONFIG} does not describe LoRA (peft_type 'LORA').")
    for field in ("use_dora", "alpha_pattern", "layer_replication"):
        if config.get(field):
            raise UserError(f"{folder / _CONFIG} has {field}, which these adapters cannot express.")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{folder / _CONFIG} has no number lora_alpha.")
    _, arrays = read_safetensors(folder / _WEIGHTS)
    flat, sites = _flat(adapters), list_sites(adapters)
    names = {site: _PREFIX + site.replace("/", ".") for site in sites}
    known = {name + end for name in names.values() for end in (_DOWN, _UP, _SHIFT)}
    if unknown := sorted(set(arrays) - known):
        raise UserError(
            f"{folder / _WEIGHTS} holds {printable(unknown[0])}, for which the model has no site. "
            f"Attach adapters there; the sites are {', '.join(sites)}."
        )
    filled: dict[tuple[str, ...], np.ndarray] = {}
    for site, name in names.items():
        if missing := [end for end in (_DOWN, _UP) if name + end not in arrays]:
            raise UserError(
                f"{folder / _WEIGHTS} lacks {name}{missing[0]}. Narrow the site pattern to what it holds."
            )
        down, up = (_float32(name + end, arrays[name + end]) for end in (_DOWN, _UP))
        shift = _float32(name + _SHIFT, arrays.get(name + _SHIFT, np.zeros(0, np.float32)))
        rank = down.shape[0] if down.ndim else 0
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank) if rank else 0.0
        filled |= _filled(flat, site, down, scale * up, scale * shift)
    return traverse_util.unflatten_dict(filled)


# ---------------------------------------------------------------------------------- one site


def _is_conv1d(flat: Mapping[tuple[str, ...], np.ndarray], site: str, conv1d: str | None) -> bool:
    """Whether `conv1d` names a site; UserError if it has to and does not, or names another layer."""
    kernels = {flat[*head, "down", "kernel"].ndim for head in list_adapters(flat, site)}
    if kernels == {3} and conv1d is None:
        raise UserError(
            f"LoRA site '{site}' has a kernel of three axes, and PEFT's layout depends on whether it is a "
            "1-D convolution or a DenseGeneral; give conv1d='', or a pattern for the convolutions' paths."
        )
    named = bool(conv1d) and re.fullmatch(str(conv1d), site) is not None
    if named and kernels != {3}:
        raise UserError(
            f"LoRA site '{site}' is no 1-D convolution, though conv1d={conv1d!r} names it: its kernel has "
            f"{max(kernels)} axes, not 3. Narrow the pattern."
        )
    return named


def _pair(
    flat: Mapping[tuple[str, ...], np.ndarray], site: str, omega: Any, joins_axes: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PEFT's lora_A [r, in] (Conv: [r, in, *window]), lora_B [out, r] and the bias [out] of a site.

    `joins_axes`: a kernel of three axes is DenseGeneral's.
    """
    downs, ups, shifts = [], [], []
    for head in list_adapters(flat, site):
        down, up = flat[*head, "down", "kernel"], flat[*head, "up", "kernel"]
        given = omega_of(omega, head, site)
        mixed = np.atleast_1d(np.asarray(given, np.float32))
        width = down.shape[-1]
        if not mixed.size or mixed.size != mixed.shape[-1] or width % mixed.size:
            raise UserError(
                f"LoRA site '{site}' got composition weights of shape {mixed.shape} for {width} inner "
                "channels; PEFT's format holds one condition: give [m] or [1, m]."
            )
        weights = np.repeat(mixed.reshape(-1), width // mixed.size)
        down = down * weights
        if down.ndim == 3 and joins_axes:
            down = down.reshape(-1, width)
        downs.append(np.moveaxis(down, (-1, -2), (0, 1)))
        ups.append(up.reshape(width, -1).T)
        if (*head, "bias") in flat:
            shifts.append(weights @ flat[*head, "bias"])
    shift = sum(shifts, np.zeros(ups[0].shape[0], np.float32))
    return np.concatenate(downs), np.concatenate(ups, axis=1), shift


def _filled(
    flat: Mapping[tuple[str, ...], np.ndarray],
    site: str,
    down: np.ndarray,
    up: np.ndarray,
    shift: np.ndarray,
) -> dict[tuple[str, ...], np.ndarray]:
    """A site's parameters with PEFT's values."""
    heads = list_adapters(flat, site)
    parameters = {k for k in flat if k[: len(heads[0])] == heads[0]}
    expected = {(*heads[0], *k) for k in (("down", "kernel"), ("up", "kernel"), ("bias",))}
    if len(heads) > 1 or parameters - expected:
        raise UserError(
            f"LoRA site '{site}' has several adapters or a condition; attach one "
            "lora.ClassLoRA(rank=r, num_classes=1), which has none, to load PEFT's format."
        )
    own_down, own_up = flat[*heads[0], "down", "kernel"], flat[*heads[0], "up", "kernel"]
    rank, width = (down.shape[0] if down.ndim else 0), own_down.shape[-1]
    fits = down.ndim >= 2 and up.ndim >= 2 and 0 < rank <= width
    if not (
        fits
        and down.size == rank * own_down.size // width
        and up.size == rank * own_up.size // width
        and up.shape[1] == rank
    ):
        raise UserError(
            f"LoRA site '{site}' does not fit PEFT's lora_A {down.shape} and lora_B {up.shape}: its pair is "
            f"{own_down.shape} and {own_up.shape}. Attach to layers of their sizes, with their rank."
        )
    down = np.moveaxis(down, (0, 1), (-1, -2)).reshape(*own_down.shape[:-1], rank)
    up = up.reshape(-1, rank).T.reshape(rank, *own_up.shape[1:])
    filled = {
        (*heads[0], "down", "kernel"): _padded(down, down.ndim - 1, width),
        (*heads[0], "up", "kernel"): _padded(up, 0, width),
    }
    if (*heads[0], "bias") in flat:
        bias = np.zeros_like(flat[*heads[0], "bias"])
        if shift.size not in (0, bias.shape[1]):
            raise UserError(
                f"LoRA site '{site}' does not fit PEFT's bias of the shape {shift.shape}."
            )
        bias[0] = shift if shift.size else 0
        filled[*heads[0], "bias"] = bias
    elif np.any(shift):
        raise UserError(f"LoRA site '{site}' has a bias in PEFT's file; attach with use_bias=True.")
    return filled


def _flat(adapters: PyTree) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters by path.

    Raises:
        UserError: there are none, or others than adapters'.
    """
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(adapters).items()}
    if not flat:
        raise UserError(
            "The tree has no adapters; give lora.split(params)[1] of a model with LoRA."
        )
    if others := ["/".join(map(str, k)) for k in flat if ADAPTER not in k]:
        raise UserError(
            f"The tree holds {printable(others[0])}, which is no adapter's; give lora.split(params)[1]."
        )
    return flat


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.itemsize > 4 or value.dtype.kind not in "fV":
        raise UserError(f"{printable(name)} has the type {value.dtype}; expected float32 or half.")
    return value.astype(np.float32)


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """With zeros up to a size along an axis."""
    missing = [(0, size - array.shape[i]) if i == axis else (0, 0) for i in range(array.ndim)]
    return np.ascontiguousarray(np.pad(array, missing))
