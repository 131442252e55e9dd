"""Safetensors files: recognised by their content, and read whole."""

import struct
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_diffusion_jax.errors import UserError, printable

MAX_HEADER = 100_000_000  # bytes, the limit that the safetensors library sets


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


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file.

    Raises:
        UserError: the file is missing, of another kind, truncated or corrupt.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file; expected a .safetensors file.")
    if not is_safetensors(path):
        raise UserError(f"{path} is not a safetensors file.")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, arrays
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is corrupt or truncated ({printable(str(error))}); export or copy it again."
        ) from error
