"""Npz files: read without pickles, written whole or not at all."""

import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.untrusted import read_entry, refusing

DIGEST = "sha256"  # the entry that holds the hash of the others
# What arrays may unpack to: images and statistics pack to a half, a bomb to a thousandth.
UNPACKED = 64 << 20  # bytes, whatever the file's size
PACKING = 16  # times the file's size beyond
ADDED = 256 << 20  # bytes that this may add to twice the file's size
_HEADERS = {  # 3.0 is for field names that are no Latin text
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
ADVICE = "Choose a path that can be written."


def read_npz(
    path: Path, wanted: Callable[[str], bool], expected: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns the names of all arrays in an npz file, and the wanted arrays by name.

    Args:
        path: an existing file.
        wanted: name -> whether to read it.
        expected: what the file should contain, for errors.

    Raises:
        UserError: another kind of file, a damaged one, one that needs pickle, one that unpacks to far
            more than it holds, or arrays with other bits than `write_npz` wrote.
    """
    where = printable(str(path), 300)
    with refusing(where, "read as npz", f"Expected {expected}: recreate it."):
        if not path.is_file() or not zipfile.is_zipfile(path):
            start = _head(path)
            raise UserError(
                f"{where} is not a whole npz file (it starts with {start!r}); expected {expected}."
            )
        with zipfile.ZipFile(path) as archive:
            entries = {e.filename.removesuffix(".npy"): e for e in archive.infolist()}
            checked = DIGEST in entries  # a hash of all arrays, so that all are read
            chosen = {name: entry for name, entry in entries.items() if checked or wanted(name)}
            size = path.stat().st_size
            limit = min(UNPACKED + PACKING * size, ADDED + 2 * size)
            if (total := sum(entry.file_size for entry in chosen.values())) > limit:
                raise UserError(
                    f"{where} unpacks to {total:,} bytes, far more than its own size; save it with np.savez, "
                    "uncompressed, if it is meant to be that large."
                )
            arrays = {}
            for name, entry in chosen.items():
                inside = f"{where}: {printable(name)}"
                arrays[name] = _array(read_entry(archive, entry, inside, limit), inside)
        if checked and str(arrays.pop(DIGEST)) != _digest(arrays):
            raise ValueError("its content has changed since it was written")
    names = [name for name in entries if name != DIGEST]
    return names, {name: arrays[name] for name in names if wanted(name)}


def _head(path: Path) -> bytes:
    """The first bytes of a file, to show in an error; none of what is no file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(8)


def _array(data: bytes, where: str) -> np.ndarray:
    """The array of an npy file, whose header must describe exactly the bytes that follow it."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise UserError(f"{where} holds objects, which need pickle and are never read.")
    left = len(data) - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
        raise UserError(
            f"{where} is damaged: it declares the shape {printable(list(shape))} of {dtype.itemsize} bytes "
            f"each, and holds {left:,} bytes."
        )
    return np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C")


def write_npz(
    path: str | os.PathLike[str],
    arrays: dict[str, Any],
    advice: str = ADVICE,
    *,
    checked: bool = True,
) -> None:
    """Writes an npz, and its folder if missing, so that a kill leaves no partial file.

    Args:
        path: the file.
        arrays: by name.
        advice: what to do where it cannot be written.
        checked: add an entry `sha256` with a hash of the arrays, which `read_npz` compares.
    """
    path = Path(path)
    with files.disk_errors(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as temporary, temporary.open("wb") as file:
            contents: dict[str, Any] = {DIGEST: np.array(_digest(arrays))} if checked else {}
            np.savez(file, **(contents | arrays))


def _digest(arrays: Mapping[str, Any]) -> str:
    """The SHA-256 of arrays with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless an npz can be written to a path: now, rather than after the work."""
    path = Path(path)
    if path.suffix != ".npz" or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not end in .npz"
        raise UserError(f"{path} {what}; the statistics go to a file that ends in .npz.")
    with files.disk_errors(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
