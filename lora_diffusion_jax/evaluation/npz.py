"""Npz files, in and out: read without pickles, written whole or not at all."""

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.files import replacing

MAGIC = {b"\x93NUMPY": "a single .npy array", b"\x80": "a pickle", b"\x89PNG": "a PNG"}


def read_npz(
    path: Path, wanted: Callable[[str], bool], expected: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns the names of all arrays in an npz file, and those arrays whose names are wanted.

    Args:
      path: an existing file.
      wanted: name -> whether to read it.
      expected: what should be in the file, for errors.

    Raises:
      UserError: another kind of file, a damaged one, or one that needs pickle.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not an npz file but {_kind(path)}; expected {expected}.")
        with np.load(path, allow_pickle=False) as file:
            return list(file.files), {name: file[name] for name in file.files if wanted(name)}
    except UserError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as npz ({error}); expected {expected}. Make it anew."
        ) from error


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        return "an empty file"
    found = [kind for start, kind in MAGIC.items() if head.startswith(start)]
    return found[0] if found else "something else, or one cut short"


def write_npz(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz through a temporary file beside it, so that a kill leaves no half file."""
    path = Path(path)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless an npz can be written to a path: now, rather than after the work."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"The statistics would go to {path}; name a file that ends in .npz.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file that ends in .npz.")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    return f"Cannot write {path}: {error.strerror}. Choose a path that can be written."
