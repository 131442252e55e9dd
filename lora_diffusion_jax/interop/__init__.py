"""Checkpoints in and out: official snapshots and state dicts in, safetensors in and out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import remote
from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser, has_map, variable_shapes
from lora_diffusion_jax.factory.pretrained import (
    Pretrained,
    check_finite,
    load_workdir,
    with_config,
    without_conditioning,
)
from lora_diffusion_jax.interop.adapters import (
    load_adapters,
    load_peft,
    save_adapters,
    save_peft,
)
from lora_diffusion_jax.interop.export import Export, export_network, read_export
from lora_diffusion_jax.interop.infer import infer_config
from lora_diffusion_jax.interop.names import base_hash, is_openai, to_state_dict, to_variables
from lora_diffusion_jax.readers.pickles import (
    is_torch_file,
    read_snapshot,
    read_torch_state_dict,
)
from lora_diffusion_jax.readers.safetensors import is_safetensors

__all__ = [
    "base_hash",
    "export_network",
    "infer_config",
    "is_torch_file",
    "load_adapters",
    "load_peft",
    "load_pretrained",
    "read_export",
    "save_adapters",
    "save_peft",
    "to_state_dict",
    "to_variables",
]


def load_pretrained(
    path: str | Path, base: str | Path | None = None, config: ConfigDict | None = None
) -> Pretrained:
    """Loads a network from a file or a directory, recognised by its content.

    Args:
        path: an official EDM or LoRA snapshot (.pkl), a PyTorch state dict of improved-diffusion (.pt),
            a .safetensors file that --mode=export wrote, or a workdir of this project. Snapshots and
            workdirs give the EMA weights.
        base: for a file of adapters alone, the network they belong to, in any of these forms.
        config: of the network; a state dict needs it, the others describe themselves and must agree
            with it. A state dict holds no adapters, so it gives the base (lora.mode=baseline).

    Raises:
        UserError: one sentence that names the file and what was found. Nothing in a file is executed.
    """
    path = remote.local(path)
    if is_torch_file(path):
        if base is not None:
            raise UserError(f"{path} is a whole network; a base ({base}) goes with adapters alone.")
        return _load_state_dict(path, config)
    loaded = _load_described(path, base)
    return loaded if config is None else with_config(loaded, config)


def _load_state_dict(path: str | Path, config: ConfigDict | None) -> Pretrained:
    """The base that a file of tensors by name and a config give together."""
    weights = read_torch_state_dict(path)
    if config is None:
        raise UserError(
            f"{path} holds tensors by name and does not describe their network; give its config too: "
            "--config=configs/cifar10_iddpm.py, or load_pretrained(path, config=...)."
        )
    if "input_blocks.0.0.weight" in weights and not is_openai(config):
        raise UserError(
            f"{path} is a network of improved-diffusion, and the config has model.name={config.model.name}; "
            "give its own config, with model.name=improved."
        )
    config = config.copy_and_resolve_references()
    if not has_map(config) and "label_emb.weight" not in weights:
        config.class_conditional = False  # nothing would read the embedding that the file lacks
    config.lora.mode, config.train.freeze_base, config.train.new_classes = "baseline", False, 0
    return _assembled(path, weights, config)


def _load_described(path: str | Path, base: str | Path | None) -> Pretrained:
    """The network of a directory or file that describes itself."""
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
    return _assembled(path, weights, config, below)


def _assembled(
    path: str | Path,
    weights: dict[str, np.ndarray],
    config: ConfigDict,
    below: Variables | None = None,
) -> Pretrained:
    """A config's network with the weights of a file, those of adapters on the base `below`."""
    with _naming(path):
        weights = {name: _float32(name, value) for name, value in weights.items()}
        loaded = Pretrained(build_denoiser(config), to_variables(weights, config, below), config)
    check_finite(loaded.variables, str(path))
    return loaded


def _base_of(export: Export, path: str | Path, base: str | Path | None) -> Variables:
    """The variables of the network that exported adapters belong to, as far as theirs has them."""
    if base is None:
        raise UserError(
            f"{path} holds adapters alone, for the base {export.base_hash[:12]}; "
            "give that network too with --base=FILE (in Python: load_pretrained(path, base=...))."
        )
    described = not is_torch_file(remote.local(base))
    variables = load_pretrained(base, config=None if described else export.config).variables
    network = variable_shapes(export.config, build_denoiser(export.config))
    variables = without_conditioning(variables, network)
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
