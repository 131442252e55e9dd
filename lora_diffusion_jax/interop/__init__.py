"""Checkpoints in and out: official snapshots and PyTorch files in, safetensors in and out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.interop.architecture import Architecture, check_architecture
from lora_diffusion_jax.interop.convert import base_hash, to_state_dict, to_variables
from lora_diffusion_jax.interop.export import (
    attach_adapters,
    export_adapters,
    export_network,
    is_safetensors,
    read_export,
)
from lora_diffusion_jax.interop.infer import infer_architecture
from lora_diffusion_jax.interop.names import count_parameters
from lora_diffusion_jax.readers.pickles import read_snapshot, read_torch_state_dict

__all__ = [
    "Pretrained",
    "attach_adapters",
    "base_hash",
    "check_architecture",
    "count_parameters",
    "export_adapters",
    "export_network",
    "infer_architecture",
    "load_pretrained",
    "read_export",
    "read_snapshot",
    "read_torch_state_dict",
    "to_state_dict",
    "to_variables",
]


def load_pretrained(path: str | Path, base: str | Path | None = None) -> Pretrained:
    """Loads a network from whatever holds one, recognised by its content.

    Args:
        path: an official EDM or LoRA snapshot (.pkl), a .safetensors file that --mode=export wrote,
            or a workdir of this project. Snapshots and workdirs give the EMA weights.
        base: for a file of adapters alone, the network they belong to, in any of these forms.

    Raises:
        UserError: one line that names the file and what was found. Nothing in a file is executed.
    """
    from lora_diffusion_jax import factory

    if Path(path).is_dir():
        return factory.load_workdir(path)
    variables, architecture = _load_file(path, base)
    try:
        config = factory.config_from_architecture(architecture)
    except UserError:  # raised again by who needs a config: factory.config_of
        config = None
    return Pretrained(
        denoiser=factory.denoiser_from_architecture(architecture, variables),
        variables=variables,
        config=config,
        architecture=architecture,
    )


def _load_file(path: str | Path, base: str | Path | None) -> tuple[dict[str, Any], Architecture]:
    """Variables and architecture of a network in a file."""
    if Path(path).is_file() and is_safetensors(path):
        export = read_export(path)
        if export.content == "adapters":
            if base is None:
                raise UserError(
                    f"{path} holds adapters alone, for the base {export.base_hash[:12]}; "
                    "give that network too (load_pretrained(path, base=...))."
                )
            return attach_adapters(export, *_load_base(base), path)
        state_dict, architecture = export.state_dict, export.architecture
    else:
        ema = read_snapshot(path).ema
        state_dict = ema.state_dict()
        with _naming(path):
            architecture = infer_architecture(ema)
    if base is not None:
        raise UserError(f"{path} is a whole network; a base ({base}) goes with adapters alone.")
    with _naming(path):
        weights = {name: _float32(name, value) for name, value in state_dict.items()}
        return to_variables(weights, architecture), architecture


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load_base(path: str | Path) -> tuple[dict[str, Any], Architecture]:
    """Variables and architecture of a network in a file or a workdir."""
    from lora_diffusion_jax import factory

    if not Path(path).is_dir():
        return _load_file(path, None)
    network = factory.load_workdir(path)
    return network.variables, factory.architecture_from_config(network.config)


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    """Half-precision weights widened, which is exact; others are not this network's."""
    if value.dtype == np.float32:
        return value
    if value.dtype.itemsize == 2 and value.dtype.kind in "fV":
        return value.astype(np.float32)
    raise UserError(f"{name} has the type {value.dtype}; expected float32 or a half precision.")
