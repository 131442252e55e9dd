"""Official state_dicts to this project's variables and back, exactly."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop.architecture import Architecture
from lora_diffusion_jax.interop.names import StateDict, iddpm_levels, name_table
from lora_diffusion_jax.readers.machine import shorten

Variables = dict[str, Any]

# How a tensor's axes change: official -> here, and back. 1x1 convolutions are Dense kernels here.
_LAYOUTS = {
    "same": (lambda v: v, lambda v: v),
    "linear": (lambda v: v.T, lambda v: v.T),
    "conv": (lambda v: v.transpose(2, 3, 1, 0), lambda v: v.transpose(3, 2, 0, 1)),
    "conv1x1": (lambda v: v[:, :, 0, 0].T, lambda v: v.T[:, :, None, None]),
}


def to_variables(state_dict: StateDict, architecture: Architecture) -> Variables:
    """Official tensors as {'params': ..., 'buffers': ...}, in this project's layout.

    Args:
        state_dict: arrays by official names; their dtype is kept.
        architecture: see `infer_architecture`.

    Raises:
        UserError: names the tensors that are missing, unused, or have another shape.
    """
    table = name_table(architecture)
    _compare("The checkpoint", set(state_dict), {entry.name for entry in table})
    variables: Variables = {"params": {}}
    for entry in table:
        value = np.asarray(state_dict[entry.name])
        if value.shape != entry.shape:
            raise UserError(
                f"The checkpoint's {entry.name} has shape {value.shape}; "
                f"its architecture asks for {entry.shape}."
            )
        if entry.collection is None:
            if not np.allclose(np.asarray(value, np.float64), entry.constant, rtol=1e-3):
                raise UserError(
                    f"The checkpoint's {entry.name} is not the filter "
                    f"{architecture['resample_filter']} that its architecture names."
                )
            continue
        value = np.ascontiguousarray(_LAYOUTS[entry.layout][0](value))
        _insert(variables.setdefault(entry.collection, {}), entry.path, value)
    return variables


def to_state_dict(
    variables: Mapping[str, Any], architecture: Architecture
) -> dict[str, np.ndarray]:
    """The exact inverse of `to_variables`: arrays by official names, in PyTorch's order.

    Raises:
        UserError: names the variables that are missing, unused, or have another shape.
    """
    leaves = {
        f"{collection}/{path}": value
        for collection in variables
        for path, value in _flatten(variables[collection])
    }
    table = name_table(architecture)
    if architecture["precond"] == "iddpm" and "buffers/u" not in leaves:
        leaves["buffers/u"] = iddpm_levels(**architecture["precond_args"])
    wanted = {f"{e.collection}/{e.path}" for e in table if e.collection is not None}
    _compare("The network", set(leaves), wanted)
    state_dict = {}
    for entry in table:
        if entry.constant is not None:
            state_dict[entry.name] = entry.constant
            continue
        here, back = _LAYOUTS[entry.layout]
        value = np.asarray(leaves[f"{entry.collection}/{entry.path}"])
        shape = here(np.broadcast_to(np.float32(0), entry.shape)).shape
        if value.shape != shape:
            raise UserError(
                f"The network's {entry.path} has shape {value.shape}; "
                f"its architecture asks for {shape}."
            )
        state_dict[entry.name] = np.ascontiguousarray(back(value))
    return state_dict


def split_adapters(variables: Mapping[str, Any]) -> tuple[Variables, Variables]:
    """Returns (base, adapters): the leaves without and with `lora` in their path."""
    base: Variables = {}
    adapters: Variables = {}
    for collection in variables:
        for path, value in _flatten(variables[collection]):
            target = adapters if "lora" in path.split("/") else base
            _insert(target.setdefault(collection, {}), path, value)
    return base, adapters


def base_hash(variables: Mapping[str, Any], architecture: Architecture) -> str:
    """SHA-256 of the base's tensors under the names they have in a network without LoRA.

    The same for a base and for a network with adapters on that base. What follows from the
    architecture (filters, discrete noise levels) does not count.
    """
    base, _ = split_adapters(variables)
    digest = hashlib.sha256()
    architecture = {**architecture, "lora": None}
    weights = to_state_dict(base, architecture)
    for entry in sorted(name_table(architecture), key=lambda entry: entry.name):
        if entry.constant is None and entry.name != "u":
            value = weights[entry.name]
            digest.update(f"{entry.name} {value.dtype} {value.shape}\n".encode())
            digest.update(value.tobytes())
    return digest.hexdigest()


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        else:
            yield path, value


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    if leaf in tree:
        raise UserError(f"Two sets of variables both have {path}; expected them to be disjoint.")
    tree[leaf] = value


def _compare(owner: str, found: set[str], wanted: set[str]) -> None:
    complaints = []
    for verb, names in (("lacks", wanted - found), ("has unused", found - wanted)):
        if names:
            listed = ", ".join(shorten(name) for name in sorted(names)[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            complaints.append(f"{verb} {len(names)} tensors: {listed}{more}")
    if complaints:
        raise UserError(f"{owner} does not fit its architecture: it {'; it '.join(complaints)}.")
