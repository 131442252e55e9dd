"""Weights as safetensors under their official names: whole networks, and adapters alone.

A file's metadata says what it is, so that it needs nothing beside it; the same facts are written
to a .json next to it for people to read. Files appear whole or not at all.
"""

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop.architecture import Architecture, check_architecture
from lora_diffusion_jax.interop.convert import (
    Variables,
    base_hash,
    split_adapters,
    to_state_dict,
    to_variables,
)
from lora_diffusion_jax.interop.names import name_table
from lora_diffusion_jax.readers.machine import shorten, show

FORMAT = "lora_diffusion_jax/1"
MAX_HEADER = 100_000_000  # bytes, the limit that the safetensors library sets
Weights = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True, repr=False)
class Export:
    """What an exported file holds.

    Attributes:
        content: 'network', or 'adapters' without their base.
        weights: 'ema' for averaged weights, 'raw' for those of the last step.
        architecture: of the whole network, adapters included.
        state_dict: arrays by official names.
        base_hash: SHA-256 of the base's tensors (`convert.base_hash`).
    """

    content: Literal["network", "adapters"]
    weights: Weights
    architecture: Architecture
    state_dict: dict[str, np.ndarray]
    base_hash: str


def export_network(
    path: str | Path,
    variables: Mapping[str, Any],
    architecture: Architecture,
    *,
    weights: Weights,
) -> None:
    """Writes a network, base and adapters, to a .safetensors file and its .json.

    Args:
        path: the file to write; its .json gets the same name with another suffix.
        variables: {'params', optional 'buffers'}, of numpy or jax arrays.
        architecture: see `architecture`.
        weights: which weights these are.

    Raises:
        UserError: variables that do not fit the architecture, or a place that cannot be written.
    """
    architecture = check_architecture(architecture)
    state_dict = to_state_dict(variables, architecture)
    digest = base_hash(variables, architecture)
    _write(path, Export("network", weights, architecture, state_dict, digest))


def export_adapters(
    path: str | Path,
    variables: Mapping[str, Any],
    architecture: Architecture,
    *,
    weights: Weights,
) -> None:
    """Writes the adapters alone, with the hash of the base that they belong to.

    Args are those of `export_network`; `variables` holds base and adapters.

    Raises:
        UserError: a network without adapters, or the errors of `export_network`.
    """
    architecture = check_architecture(architecture)
    if architecture["lora"] is None:
        raise UserError("This network has no adapters to export; export the whole network instead.")
    digest = base_hash(variables, architecture)
    whole = to_state_dict(variables, architecture)
    names = adapter_names(architecture)
    state_dict = {name: value for name, value in whole.items() if name in names}
    _write(path, Export("adapters", weights, architecture, state_dict, digest))


def adapter_names(architecture: Architecture) -> set[str]:
    """The official names of the adapters' tensors."""
    return {e.name for e in name_table(architecture) if "lora" in e.path.split("/")}


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins like safetensors: a header's length, then its JSON.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER


def read_export(path: str | Path) -> Export:
    """Reads what `export_network` or `export_adapters` wrote, bit for bit.

    Raises:
        UserError: the file is missing, truncated, of another kind, or its metadata do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; expected a .safetensors file.")
    if not is_safetensors(path):
        raise UserError(f"{path} is not a safetensors file; expected one that --mode=export wrote.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            facts = _facts(path, metadata)
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged or truncated ({shorten(str(error))}); export or copy it again."
        ) from error
    return Export(state_dict=state_dict, **facts)


def attach_adapters(
    adapters: Export, base: Mapping[str, Any], base_architecture: Architecture, path: str | Path
) -> tuple[Variables, Architecture]:
    """Puts exported adapters on their base.

    Args:
        adapters: what `read_export` gave for the adapters' file.
        base: variables of the base network; adapters in it, if any, are left out.
        base_architecture: its architecture.
        path: the adapters' file, for messages.

    Returns:
        Variables and architecture of the whole network.

    Raises:
        UserError: another base than the one they were trained on.
    """
    found = base_hash(base, base_architecture)
    if found != adapters.base_hash:
        raise UserError(
            f"{path} holds adapters for the base {adapters.base_hash[:12]}, but the base given is "
            f"{found[:12]}; give the network they were trained on (same weights, EMA or raw)."
        )
    architecture = adapters.architecture
    names = adapter_names(architecture)
    alone, _ = split_adapters(base)
    whole = to_state_dict(alone, {**architecture, "lora": None})
    sites = {name.removesuffix(".lora_down.weight") for name in names}
    renamed = {_adapted_name(name, sites): value for name, value in whole.items()}
    return to_variables({**renamed, **adapters.state_dict}, architecture), architecture


def _adapted_name(name: str, sites: set[str]) -> str:
    """The base's X.weight and X.bias are X.conv.weight and X.conv.bias beside an adapter."""
    site, _, leaf = name.rpartition(".")
    return f"{site}.conv.{leaf}" if site in sites else name


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of an export, checked."""
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file of another program (format "
            f"{show(metadata.get('format'))}); expected one that --mode=export wrote."
        )
    facts = {name: metadata.get(name) for name in ("content", "weights", "base_hash")}
    digest = facts["base_hash"] or ""
    if facts["content"] not in ("network", "adapters") or facts["weights"] not in ("ema", "raw"):
        raise UserError(f"{path} does not say whether it holds a network or adapters, EMA or raw.")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UserError(f"{path} has no valid hash of its base.")
    try:
        architecture = check_architecture(json.loads(metadata.get("architecture", "")))
    except (UserError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} has no valid architecture: {shorten(str(error), 300)}") from error
    return {**facts, "architecture": architecture}


def _write(path: str | Path, export: Export) -> None:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors, so that other programs know it.")
    facts = {
        "format": FORMAT,
        "content": export.content,
        "weights": export.weights,
        "base_hash": export.base_hash,
    }
    architecture = json.dumps(export.architecture, allow_nan=False)
    with _replacing(path) as temporary:
        save_file(export.state_dict, temporary, {**facts, "architecture": architecture})
        mask = os.umask(0)  # the library makes files for their owner alone
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
    readable = {**facts, "architecture": export.architecture}
    with _replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(readable, indent=2) + "\n")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and moves it into place when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {shorten(str(error), 200)}.") from error
