"""Npz files: read without pickles, written whole or not at all."""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError

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
        UserError: another kind of file, a damaged one, or one that needs pickle.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(8)
            raise UserError(
                f"{path} is not a whole npz file (it starts with {start!r}); expected {expected}."
            )
        with np.load(path, allow_pickle=False) as file:
            return list(file.files), {name: file[name] for name in file.files if wanted(name)}
    except UserError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as npz ({error}); expected {expected}. Recreate it."
        ) from error


def write_npz(path: str | os.PathLike[str], arrays: dict[str, Any], advice: str = ADVICE) -> None:
    """Writes an npz, and its folder if missing, so that a kill leaves no partial file."""
    path = Path(path)
    with files.disk_errors(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless an npz can be written to a path: now, rather than after the work."""
    path = Path(path)
    if path.suffix != ".npz" or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not end in .npz"
        raise UserError(f"{path} {what}; the statistics go to a file that ends in .npz.")
    with files.disk_errors(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
