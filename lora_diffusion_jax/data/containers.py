"""Folders and ZIP files as flat, read-only collections of named files."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lora_diffusion_jax.errors import UserError

# No image and no dataset.json is larger; a ZIP entry that claims more is refused before inflating.
_MAX_BYTES = 2**28


class Container(Protocol):
    """Named files; names are relative, with '/' between directories."""

    path: Path
    sizes: dict[str, int]  # name -> bytes, in sorted order of the names

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading from its start; it is seekable."""
        ...

    def read(self, name: str) -> bytes:
        """Returns a file's bytes."""
        ...

    def where(self, name: str) -> str:
        """The file's name for error messages."""
        ...


class Folder:
    """A directory and all below it, symbolic links followed; hidden names are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        sizes: dict[str, int] = {}
        seen = set()
        for directory, children, files in os.walk(path, followlinks=True, onerror=_walk_error):
            real = os.path.realpath(directory)
            if real in seen:  # a link to a directory above: walking on would never end
                children.clear()
                continue
            seen.add(real)
            children[:] = [child for child in children if not _is_hidden(child)]
            for name in files:
                full = os.path.join(directory, name)
                if not _is_hidden(name) and os.path.isfile(full):
                    sizes[Path(full).relative_to(path).as_posix()] = os.path.getsize(full)
        self.sizes = dict(sorted(sizes.items()))

    def open(self, name: str) -> BinaryIO:
        with _named_errors(self.where(name)):
            return (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        with _named_errors(self.where(name)):
            return (self.path / name).read_bytes()

    def where(self, name: str) -> str:
        return str(self.path / name)


class Zip:
    """A ZIP file read in place; one handle per process, since forked handles share a position.

    zipfile locks around each read of the shared handle, so threads may read at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[int, zipfile.ZipFile] = {}
        entries = [
            e
            for e in self._handle().infolist()
            if not e.is_dir() and not any(_is_hidden(part) for part in e.filename.split("/"))
        ]
        self.sizes = {e.filename: e.file_size for e in sorted(entries, key=lambda e: e.filename)}
        if len(self.sizes) < len(entries):
            names = sorted(e.filename for e in entries)
            twice = next(a for a, b in zip(names, names[1:], strict=False) if a == b)
            raise UserError(f"{path} holds {twice!r} twice; expected each name once. Pack it anew.")
        for name in self.sizes:
            if name.lower().endswith(".zip"):
                raise UserError(
                    f"{path} contains another ZIP file, {name!r}, which is not read. "
                    "Unpack the outer one and give the inner one as data.path."
                )

    def open(self, name: str) -> BinaryIO:
        if self.sizes[name] > _MAX_BYTES:
            raise UserError(
                f"{self.where(name)} is {self.sizes[name]:,} bytes when unpacked; "
                f"expected an image or dataset.json of at most {_MAX_BYTES:,}."
            )
        with _named_errors(self.where(name)):
            return self._handle().open(name)

    def read(self, name: str) -> bytes:
        with self.open(name) as file, _named_errors(self.where(name)):
            return file.read()

    def where(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _handle(self) -> zipfile.ZipFile:
        handle = self._handles.get(os.getpid())
        if handle is None:
            try:
                handle = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
                raise UserError(
                    f"{self.path} is not a ZIP file that can be read ({error}); "
                    "expected a folder or a ZIP of PNG or JPEG images."
                ) from error
            except OSError as error:
                raise UserError(f"cannot open {self.path}: {error.strerror}.") from error
            # Two threads may both open one; the first to store it wins.
            handle = self._handles.setdefault(os.getpid(), handle)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def open_container(path: str | Path) -> Container:
    """Opens a folder or a ZIP file; UserError when it is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        parent = next(p for p in path.parents if p.exists())
        there = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
        raise UserError(
            f"{path} does not exist; {parent} holds {', '.join(there) or 'nothing'}. "
            "Give a folder or ZIP of images as data.path."
        )
    return Zip(path)


def _is_hidden(name: str) -> bool:
    # macOS puts '__MACOSX/._name.png' beside every name.png; they are no images.
    return name.startswith(".") or name == "__MACOSX"


def _walk_error(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}.") from error


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:  # RuntimeError: encrypted entry
        raise UserError(f"cannot read {where}: {error}. Restore or remove it.") from error
