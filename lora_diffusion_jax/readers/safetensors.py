"""Safetensors files: recognised by their content, and read whole."""

import struct
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
from safetensors import safe_open

from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.untrusted import MAX_JSON, parse_json, refusing

MAX_HEADER = (
    100_000_000  # bytes, the limit that the safetensors library sets; we read up to MAX_JSON
)
_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
)


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
        UserError: the file is missing, of another kind, truncated or corrupt, or of other types.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file; expected a .safetensors file.")
    if not is_safetensors(path):
        raise UserError(f"{path} is not a safetensors file.")
    with refusing(str(path), "read: it is corrupt or truncated", "Export or copy it again."):
        _check_header(path)
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, arrays


def _check_header(path: str | Path) -> None:
    """Raises UserError for a header that the library should not meet, or tensors numpy cannot hold."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = parse_json(file.read(min(size, MAX_JSON + 1)), f"{path}: its header")
    for name, entry in header.items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if name != "__metadata__" and kind not in _DTYPES:
            raise UserError(
                f"{path} is corrupt or truncated, or not for this program: {printable(name)} has the type "
                f"{printable(kind)}; expected one of {', '.join(_DTYPES)}."
            )
