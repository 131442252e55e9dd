"""Npz files: read without pickles, written whole or not at all."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError

DIGEST = "sha256"  # the entry that holds the hash of the others
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
        UserError: another kind of file, a damaged one, one that needs pickle, or arrays with other
            bits than `write_npz` wrote.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(8)
            raise UserError(
                f"{path} is not a whole npz file (it starts with {start!r}); expected {expected}."
            )
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name != DIGEST]
            checked = DIGEST in file.files
            arrays = {name: file[name] for name in names if checked or wanted(name)}
            if checked and str(file[DIGEST]) != _digest(arrays):
                raise ValueError("its content has changed since it was written")
            return names, {name: array for name, array in arrays.items() if wanted(name)}
    except UserError:
        raise
    # Whatever zipfile and numpy raise for damaged files: ValueError, BadZipFile, SyntaxError, ...
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as npz ({error}); expected {expected}. Recreate it."
        ) from error


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
