"""Checkpoints in and out: official snapshots in, safetensors in and out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.factory.pretrained import Pretrained, check_finite, load_workdir
from lora_diffusion_jax.interop.export import Export, export_network, read_export
from lora_diffusion_jax.interop.infer import infer_config
from lora_diffusion_jax.interop.names import base_hash, to_state_dict, to_variables
from lora_diffusion_jax.readers.pickles import read_snapshot
from lora_diffusion_jax.readers.safetensors import is_safetensors

__all__ = [
    "base_hash",
    "export_network",
    "infer_config",
    "load_pretrained",
    "read_export",
    "to_state_dict",
    "to_variables",
]


def load_pretrained(path: str | Path, base: str | Path | None = None) -> Pretrained:
    """Loads a network from a file or a directory, recognised by its content.

    Args:
        path: an official EDM or LoRA snapshot (.pkl), a .safetensors file that --mode=export wrote,
            or a workdir of this project. Snapshots and workdirs give the EMA weights.
        base: for a file of adapters alone, the network they belong to, in any of these forms.

    Raises:
        UserError: one sentence that names the file and what was found. Nothing in a file is executed.
    """
    path = files.expand(path)
    if Path(path).is_dir():
        return load_workdir(path)
    below = None
    if Path(path).is_file() and is_safetensors(path):
        export = read_export(path)
        config, weights = export.config, export.state_dict
        if export.content == "adapters":
            below = _base_of(export, path, base)
    else:
        network = read_snapshot(path)
        with _naming(path):
            config, weights = infer_config(network), network.state_dict()
    if base is not None and below is None:
        raise UserError(f"{path} is a whole network; a base ({base}) goes with adapters alone.")
    with _naming(path):
        weights = {name: _float32(name, value) for name, value in weights.items()}
        loaded = Pretrained(build_denoiser(config), to_variables(weights, config, below), config)
    check_finite(loaded.variables, str(path))
    return loaded


def _base_of(export: Export, path: str | Path, base: str | Path | None) -> Variables:
    """The variables of the network that exported adapters belong to."""
    if base is None:
        raise UserError(
            f"{path} holds adapters alone, for the base {export.base_hash[:12]}; "
            "give that network too with --base=FILE (in Python: load_pretrained(path, base=...))."
        )
    variables = load_pretrained(base).variables
    if (found := base_hash(variables)) != export.base_hash:
        raise UserError(
            f"{path} holds adapters for the base {export.base_hash[:12]}, but the base given is "
            f"{found[:12]}; give the network they were trained on (same weights, EMA or raw)."
        )
    return variables


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file's name before an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    """Half-precision weights widened, which is exact; other types are errors."""
    if value.dtype == np.float32:
        return value
    if value.dtype.itemsize == 2 and value.dtype.kind in "fV":
        return value.astype(np.float32)
    raise UserError(f"{name} has the type {value.dtype}; expected float32 or a half precision.")
