"""Image folders and ZIP files in the layout of StyleGAN and EDM, read in place."""

import abc
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from lora_diffusion_jax.data.decode import Shape, read_shape
from lora_diffusion_jax.data.image_source import (
    EncodedImage,
    ImageSource,
    common_shape,
    evenly_spaced,
)
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.files import cannot_use

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FOREIGN = (".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy", ".heic", ".ppm", ".pgm", ".jp2")
_MAX_BYTES = 2**28  # of a ZIP entry: images and dataset.json are smaller; more is not inflated
_MAX_HEADERS = 100_000  # image headers checked on opening (0.1 ms each); evenly spaced beyond
_MAX_CLASSES = 100_000
_ADVICE = "Restore or remove it."


class FileSource(ImageSource):
    """PNG and JPEG images in a folder or a ZIP file, including those in nested folders.

    The images are in sorted order of their names. Labels come from a `dataset.json` at the top,
    {"labels": [["a/b.png", 3], ...]} with each file's path from the top and its class, or
    {"labels": null} for none. Without it there are none, unless class_folders is set: then the
    first folder of a path is its class, numbered in sorted order. Hidden files are left out.

    Args:
        path: the folder or ZIP file.
        class_folders: take each image's first folder as its class.

    Raises:
        UserError: nothing to read, damaged or mixed images, labels that do not fit.
    """

    def __init__(self, path: str | Path, *, class_folders: bool = False) -> None:
        self._files = _open(Path(path).expanduser())
        self._names = _image_names(self._files)
        labels, self.class_names, self.label_origin = _labels(
            self._files, self._names, class_folders
        )
        self._labels = labels or [0] * len(self._names)
        self.num_classes = len(self.class_names)
        self.title = f"images in {self._files.path}"
        self.bytes_on_disk = sum(self._files.sizes[name] for name in self._names)
        self.image_shape = self._find_shape()

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: Sequence[int]) -> list[EncodedImage]:
        return [
            EncodedImage(
                self._files.read(self._names[i]), self._labels[i], self._files.where(self._names[i])
            )
            for i in indices
        ]

    def labels(self) -> np.ndarray:
        return np.array(self._labels, np.int32)  # known without the images

    def _identity(self) -> Sequence[str]:
        return [
            f"{name} {self._files.sizes[name]} {label}"
            for name, label in zip(self._names, self._labels, strict=True)
        ]

    def _find_shape(self) -> Shape:
        def shapes() -> Iterator[tuple[Shape, str]]:
            title = f"checking {self._files.path}"
            indices = evenly_spaced(len(self), _MAX_HEADERS)
            for i in tqdm(indices, desc=title, unit="img", delay=2, disable=None):
                where = self._files.where(self._names[i])
                with self._files.open(self._names[i]) as file:
                    yield read_shape(file, where), where

        return common_shape(shapes())


class _Files(abc.ABC):
    """A read-only collection of named files; names are paths from its top with '/' between folders.

    Attributes:
        path: of the folder or the ZIP file.
        sizes: name -> bytes, in sorted order of the names.
    """

    path: Path
    sizes: dict[str, int]

    @abc.abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading from its start; it is seekable."""

    def read(self, name: str) -> bytes:
        with self.open(name) as file, _reading(self.where(name)):
            return file.read()

    def where(self, name: str) -> str:
        """The file's name in error messages."""
        return f"{self.path}/{name}"


class _Folder(_Files):
    """A directory and all below it; symbolic links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        sizes: dict[str, int] = {}
        seen = set()
        for folder, children, names in os.walk(path, followlinks=True, onerror=_raise_walk_error):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above it: walking on would never end
                children.clear()
                continue
            seen.add(real)
            children[:] = [child for child in children if not _is_hidden(child)]
            for name in names:
                file = Path(folder, name)
                if not _is_hidden(name) and file.is_file():
                    sizes[file.relative_to(path).as_posix()] = file.stat().st_size
        self.sizes = dict(sorted(sizes.items()))

    def open(self, name: str) -> IO[bytes]:
        with _reading(self.where(name)):
            return (self.path / name).open("rb")


class _Zip(_Files):
    """A ZIP file read in place; one handle per process, since forked handles share a position.

    zipfile locks around each read of a handle, so threads may share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[int, zipfile.ZipFile] = {}
        entries = sorted(
            (entry.filename, entry.file_size)
            for entry in self._handle().infolist()
            if not entry.is_dir() and not any(map(_is_hidden, entry.filename.split("/")))
        )
        self.sizes = dict(entries)
        for (name, _), (following, _) in zip(entries, entries[1:], strict=False):
            if name == following:
                raise UserError(f"{path} holds {name!r} twice; expected each name once. Repack it.")

    def open(self, name: str) -> IO[bytes]:
        if self.sizes[name] > _MAX_BYTES:
            raise UserError(
                f"{self.where(name)} is {self.sizes[name]:,} bytes when unpacked; expected an image "
                f"or dataset.json of at most {_MAX_BYTES:,} bytes."
            )
        with _reading(self.where(name)):
            return self._handle().open(name)

    def _handle(self) -> zipfile.ZipFile:
        pid = os.getpid()
        if pid not in self._handles:
            with _reading(str(self.path), "Give a folder or a ZIP file of images as data.path."):
                # Two threads may both open one; the first to store it wins.
                self._handles.setdefault(pid, zipfile.ZipFile(self.path))
        return self._handles[pid]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}


def _open(path: Path) -> _Files:
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        parent = next(p for p in path.parents if p.exists())
        names = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
        raise UserError(
            f"{path} does not exist; {parent} holds {', '.join(names) or 'nothing'}. "
            "Give a folder or ZIP of images as data.path."
        )
    return _Zip(path)


def _is_hidden(name: str) -> bool:
    # macOS puts '__MACOSX/._name.png', which is not an image, beside every name.png.
    return name.startswith(".") or name == "__MACOSX"


def _raise_walk_error(error: OSError) -> None:
    raise cannot_use(error.filename, error.strerror or "cannot list it", _ADVICE) from error


@contextmanager
def _reading(where: str, advice: str = _ADVICE) -> Iterator[None]:
    """Turns errors of the disk and of zipfile into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise cannot_use(where, error.strerror or str(error), advice) from error
    except Exception as error:
        # zipfile raises half a dozen unrelated types: damage, encryption, unknown compression.
        raise UserError(f"{where} cannot be unzipped ({error}). {advice}") from error


def _image_names(files: _Files) -> list[str]:
    foreign = [name for name in files.sizes if name.lower().endswith(_FOREIGN)]
    if foreign:
        raise UserError(
            f"{files.where(foreign[0])} is neither PNG nor JPEG ({len(foreign):,} such files), and "
            "would be left out. Convert or remove them."
        )
    names = [name for name in files.sizes if name.lower().endswith(_SUFFIXES)]
    inner = next((name for name in files.sizes if name.lower().endswith(".zip")), None)
    if inner and (isinstance(files, _Zip) or not names):
        raise UserError(
            f"{files.path} contains a ZIP file, {inner!r}, which is not searched. Give that file as "
            "data.path, after unpacking the outer one if it lies in a ZIP file itself."
        )
    if not names:
        raise UserError(
            f"{files.path} holds no PNG or JPEG images ({len(files.sizes):,} other files)."
        )
    return names


def _labels(
    files: _Files, names: Sequence[str], class_folders: bool
) -> tuple[list[int], Sequence[str], str]:
    """Returns (class of each image, class names, origin); both lists are empty without labels."""
    has_json = "dataset.json" in files.sizes
    if class_folders and has_json:
        raise UserError(
            f"{files.path} has a dataset.json, but data.class_folders asks for labels from folder "
            "names. Remove one of them."
        )
    if class_folders:
        origin = "names of the folders"
        folders = {name: name.split("/")[0] for name in names if "/" in name}
        class_names = sorted(set(folders.values()))
        ids = {folder: i for i, folder in enumerate(class_names)}
        table = {name: ids[folder] for name, folder in folders.items()}
    elif has_json:
        origin = "dataset.json"
        table = _read_dataset_json(files)
        if table is None:
            return [], (), 'dataset.json has "labels": null'
        class_names = [str(i) for i in range(max(table.values(), default=-1) + 1)]
    else:
        nested = [name for name in files.sizes if PurePosixPath(name).name == "dataset.json"]
        if nested:
            raise UserError(
                f"{files.where(nested[0])} lies below the top of {files.path}, where it is ignored: "
                "give its own folder as data.path, or pack the ZIP without the outer folder."
            )
        return [], (), "no dataset.json, so no labels"
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(
            f"{files.where(missing[0])} has no label ({len(missing):,} of {len(names):,} images have "
            f"none); labels come from {origin}. Label all images, or none: "
            '{"labels": null} in dataset.json.'
        )
    extra = table.keys() - set(names)
    if extra:
        raise UserError(
            f"dataset.json labels {files.where(min(extra))}, which is missing ({len(extra):,} such "
            "names). Restore the images or remove their labels."
        )
    return [table[name] for name in names], tuple(class_names), origin


def _read_dataset_json(files: _Files) -> dict[str, int] | None:
    """Returns {name: class}, or None for {"labels": null}; a UserError says what is malformed."""
    where = files.where("dataset.json")
    expected = 'expected {"labels": [["name.png", 0], ...]} or {"labels": null}'
    data = files.read("dataset.json")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{where} is not valid JSON ({error}); {expected}.") from error
    match content:
        case {"labels": None}:
            return None
        case {"labels": list(entries)}:
            pass
        case _:
            raise UserError(f"{where} has no list 'labels'; {expected}.")
    table: dict[str, int] = {}
    for i, entry in enumerate(entries):
        match entry:
            case [str(name), int(label)] if type(label) is int and 0 <= label < _MAX_CLASSES:
                name = name.replace("\\", "/")
            case _:
                raise UserError(
                    f"{where}: entry {i} of 'labels' is {json.dumps(entry)[:80]}; expected "
                    f"[name, class] with a class from 0 to {_MAX_CLASSES - 1}."
                )
        if table.setdefault(name, label) != label:
            raise UserError(f"{where} gives {name!r} the classes {table[name]} and {label}.")
    return table
