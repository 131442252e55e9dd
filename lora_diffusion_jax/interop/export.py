"""Weights as safetensors under their official names: whole networks, and adapters alone.

A file's metadata describes it, so that it needs nothing beside it; the same facts are written to a .json
next to it for people to read.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from lora_diffusion_jax.array_types import Variables
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.factory.pretrained import config_from_dict, network_fields
from lora_diffusion_jax.files import atomic, disk_errors, write_text
from lora_diffusion_jax.interop.infer import config_from_format_1
from lora_diffusion_jax.interop.names import base_hash, is_openai, official_names, to_state_dict
from lora_diffusion_jax.paths import is_adapter
from lora_diffusion_jax.readers.safetensors import read_safetensors
from lora_diffusion_jax.untrusted import parse_json

FORMAT = "lora_diffusion_jax/2"
FORMAT_1 = "lora_diffusion_jax/1"  # still readable
Weights = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True, repr=False)
class Export:
    """What an exported file holds.

    Attributes:
        content: 'network', or 'adapters' without their base.
        weights: 'ema' for averaged weights, 'raw' for those of the last step.
        base_hash: SHA-256 of the base's tensors (`names.base_hash`).
        config: of the whole network, adapters included.
        state_dict: arrays by official names.
    """

    content: Literal["network", "adapters"]
    weights: Weights
    base_hash: str
    config: ConfigDict
    state_dict: dict[str, np.ndarray]


def export_network(
    path: str | Path,
    variables: Variables,
    config: ConfigDict,
    *,
    weights: Weights,
    adapters_only: bool = False,
) -> None:
    """Writes a network to a .safetensors file and its .json.

    Args:
        path: the file to write; its .json has the same name with another suffix.
        variables: {'params', optional 'buffers'}, of numpy or jax arrays.
        config: of the network.
        weights: which weights these are.
        adapters_only: leaves the base out, but for its hash.

    Raises:
        UserError: the variables are not the network's, it has no adapters to export, or the file
            cannot be written.
    """
    path = check_suffix(path)
    state_dict = to_state_dict(variables, config)
    if adapters_only:
        names = official_names(traverse_util.flatten_dict(variables), is_openai(config))
        adapters = [name for variable, name in names.items() if is_adapter("/".join(variable))]
        if not adapters:
            raise UserError("This network has no adapters to export; export the whole network.")
        state_dict = {name: state_dict[name] for name in adapters}
    facts = {
        "format": FORMAT,
        "content": "adapters" if adapters_only else "network",
        "weights": weights,
        "base_hash": base_hash(variables),
    }
    fields = network_fields(config)
    write_safetensors(path, state_dict, {**facts, "config": json.dumps(fields)})
    with disk_errors(path):
        readable = json.dumps({**facts, "config": fields}, indent=2)
        write_text(path.with_suffix(".json"), readable + "\n")


def check_suffix(path: str | Path) -> Path:
    """The path of a file to write; raises UserError unless it ends in .safetensors."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors, so that other programs know it.")
    return path


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, and the folder for it.

    Raises:
        UserError: it cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(arrays, temporary, metadata)
            mask = os.umask(0)  # the library makes files that only their owner can read
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)


def read_export(path: str | Path) -> Export:
    """Reads what `export_network` wrote, bit for bit.

    Raises:
        UserError: the file is missing, corrupt, of another kind, or its metadata are invalid.
    """
    metadata, state_dict = read_safetensors(path)
    if metadata.get("format") not in (FORMAT, FORMAT_1):
        raise UserError(
            f"{path} is a safetensors file of another program (format "
            f"{printable(metadata.get('format'))}); expected one that --mode=export wrote."
        )
    facts: dict[str, Any] = {
        name: metadata.get(name) for name in ("content", "weights", "base_hash")
    }
    digest = facts["base_hash"] or ""
    if facts["content"] not in ("network", "adapters") or facts["weights"] not in ("ema", "raw"):
        raise UserError(f"{path} does not say whether it holds a network or adapters, EMA or raw.")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UserError(f"{path} has no valid hash of its base.")
    return Export(**facts, config=_config(path, metadata), state_dict=state_dict)


def _config(path: str | Path, metadata: Mapping[str, str]) -> ConfigDict:
    old = metadata["format"] == FORMAT_1
    try:
        text = metadata.get("architecture" if old else "config", "")
        saved = parse_json(text, "its JSON", infinite=True)
        if type(saved) is not dict:
            raise UserError("it is not a JSON object.")
        return config_from_format_1(saved) if old else config_from_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(str(error), 300)
        raise UserError(f"{path} has no valid description of its network: {reason}") from error
