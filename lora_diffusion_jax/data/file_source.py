"""Image folders and ZIP files in the layout of StyleGAN and EDM, read in place."""

import abc
import json
import os
import re
import stat
import zipfile
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from lora_diffusion_jax.data.decode import (
    HEAD,
    MAX_BYTES,
    SUFFIXES,
    Shape,
    colour,
    format_of,
    read_shape,
)
from lora_diffusion_jax.data.image_source import (
    EncodedImage,
    EncodedSource,
    common_shape,
    evenly_spaced,
)
from lora_diffusion_jax.errors import NotThereError, UserError, printable
from lora_diffusion_jax.files import cannot_use, check_depth, expand, walk
from lora_diffusion_jax.untrusted import is_text, normal, open_entry, parse_json, refusing

_FOREIGN = (
    *(".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy", ".heic", ".ppm", ".pgm", ".jp2", ".avif"),
    ".jxl",
)
_LABELS = "dataset.json"
_MAX_HEADERS = 100_000  # image headers checked on opening (0.1 ms each); evenly spaced beyond
_MAX_CLASSES = 100_000
_ADVICE = "Restore or remove it."
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class FileSource(EncodedSource):
    """PNG and JPEG images in a folder or a ZIP file, including those in nested folders.

    What is an image is decided by the ending .png, .jpg or .jpeg, and of other files by their first
    bytes. Hidden files are left out, and counted. The images are in sorted order of their names, which
    are compared in one spelling: '/' between folders, no './', Unicode's form NFC. Labels come from a
    `dataset.json` at the top, {"labels": [["a/b.png", 3], ...]} with each file's path from the top and
    its class, or {"labels": null} for none. Without it there are none, unless class_folders is set: then
    the first folder of a path is its class, below a folder that holds all images; the classes are numbered in
    the natural order of their names (2 before 10; -1 before 0, and 0.25 before 0.5, where all are numbers).

    Args:
        path: the folder or ZIP file.
        class_folders: take each image's first folder as its class.
        background: the colour behind transparent pixels; '' refuses them.

    Raises:
        UserError: nothing to read, damaged or mixed images, labels that do not fit.
    """

    def __init__(
        self, path: str | Path, *, class_folders: bool = False, background: str = ""
    ) -> None:
        self.background = background
        if background:
            colour(background)
        self._files = _open(Path(expand(path, "data.path")))
        self._names, self.left_out = _image_names(self._files)
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

    def empty_classes(self) -> list[int]:
        counts = np.bincount(self._labels, minlength=self.num_classes)
        return np.flatnonzero(counts == 0).tolist()

    def _identity(self) -> Sequence[str]:
        images = [
            f"{name} {self._files.sizes[name]} {label}"
            for name, label in zip(self._names, self._labels, strict=True)
        ]
        return [*images, self.background] if self.background else images

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
    """A read-only collection of named files; names are paths from its top, spelled by `_spelled`.

    Attributes:
        path: of the folder or the ZIP file.
        sizes: name -> bytes, in sorted order of the names.
        folders: names of all folders with files or nothing in them; others lead to these.
        hidden: how many hidden files there are, without those that macOS puts beside others.
    """

    path: Path
    sizes: dict[str, int]
    folders: set[str]
    hidden: int

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders, self.hidden = set(), 0
        self._stored: dict[str, str] = {}  # name -> as it is stored
        sizes = {}
        for stored, size in self._list():
            name = _spelled(stored, str(path))
            if name in sizes:
                raise UserError(
                    f"{path} holds {printable(name, 200)!r} twice ({self._stored[name][:200]!a} and "
                    f"{stored[:200]!a}); "
                    "expected each name once. Remove or rename one."
                )
            sizes[name], self._stored[name] = size, stored
            self.folders.add(str(PurePosixPath(name).parent))
        self.sizes = dict(sorted(sizes.items()))

    @abc.abstractmethod
    def _list(self) -> Iterator[tuple[str, int]]:
        """Yields (stored name, bytes) of every file that is not hidden.

        Adds empty folders, and counts the hidden files.
        """

    @abc.abstractmethod
    def _open(self, name: str) -> IO[bytes]: ...

    def open(self, name: str, limit: int = MAX_BYTES) -> IO[bytes]:
        """Opens a file of at most `limit` bytes for reading from its start; it is seekable."""
        if self.sizes[name] > limit:
            raise UserError(
                f"{self.where(name)} holds {self.sizes[name]:,} bytes; expected at most {limit:,} in such a "
                "file. Replace or remove it."
            )
        with refusing(self.where(name), "opened", _ADVICE):
            return self._open(name)

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """The content of a file of at most `limit` bytes."""
        with self.open(name, limit) as file, refusing(self.where(name), advice=_ADVICE):
            data = file.read(self.sizes[name])
            if len(data) != self.sizes[name]:
                raise EOFError(f"{len(data):,} of {self.sizes[name]:,} bytes")
            return data

    def head(self, name: str) -> bytes:
        """Its first HEAD bytes, whatever its size."""
        with self.open(name, self.sizes[name]) as file, refusing(self.where(name), advice=_ADVICE):
            return file.read(HEAD)

    def where(self, name: str) -> str:
        """The file's name in error messages."""
        return f"{self.path}/{printable(name, 200)}"


class _Folder(_Files):
    """A directory and all below it; symbolic links are followed."""

    def _list(self) -> Iterator[tuple[str, int]]:
        seen: dict[str, str] = {}
        for folder, children, names in walk(self.path, followlinks=True, onerror=_raise_walk_error):
            real = os.path.realpath(folder)
            if real in seen:  # its images would count twice, or walking on would never end
                raise UserError(
                    f"{folder} and {seen[real]} are the same folder, through a link. Remove the link, or "
                    "copy the files if they are meant to count twice."
                )
            seen[real] = folder
            hidden = [child for child in children if _is_hidden(child)]
            children[:] = [child for child in children if not _is_hidden(child)]
            self.hidden += sum(_count_files(Path(folder, child)) for child in hidden)
            self.folders.update(
                _spelled(self._name(Path(folder, c)), str(self.path)) for c in children
            )
            for name in names:
                if _is_hidden(name):
                    self.hidden += not _is_of_macos(name)
                else:
                    yield self._name(Path(folder, name)), _file_size(Path(folder, name))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _open(self, name: str) -> IO[bytes]:
        return (self.path / self._stored[name]).open("rb")


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)!a}, which is missing. {_ADVICE}"
            ) from error
        raise cannot_use(path, error.strerror or "cannot look at it", _ADVICE) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is neither a file nor a folder. Remove it.")
    return status.st_size


class _Zip(_Files):
    """A ZIP file read in place; one handle per process, since forked handles share a position.

    zipfile locks around each read of a handle, so threads may share it.
    """

    def __init__(self, path: Path) -> None:
        self._handles: dict[int, zipfile.ZipFile] = {}
        self.path = path
        super().__init__(path)

    def _list(self) -> Iterator[tuple[str, int]]:
        for entry in self._handle().infolist():
            parts = _spelled(entry.filename, str(self.path)).split("/")
            if ".." in parts:
                raise UserError(
                    f"{self.path} holds {entry.filename[:200]!a}, a name that leads out of it. Repack it."
                )
            is_folder = entry.filename.endswith(("/", "\\"))
            if any(map(_is_hidden, parts)):
                self.hidden += not (is_folder or any(map(_is_of_macos, parts)))
            elif is_folder:
                self.folders.add("/".join(parts))
            else:
                yield entry.filename, entry.file_size

    def _open(self, name: str) -> IO[bytes]:
        archive = self._handle()
        entry = archive.getinfo(self._stored[name])
        return open_entry(archive, entry, self.where(name), entry.file_size)

    def _handle(self) -> zipfile.ZipFile:
        pid = os.getpid()
        if pid not in self._handles:
            advice = "Give a folder or a ZIP file of images as data.path."
            with refusing(str(self.path), "unzipped", advice):
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
        raise NotThereError(
            f"{path} does not exist; {parent} holds {printable(', '.join(names), 200) or 'nothing'}. "
            "Give a folder or ZIP of images as data.path."
        )
    _file_size(path)  # a pipe would be waited for
    return _Zip(path)


def _spelled(name: str, where: str) -> str:
    """One spelling of a path: old Windows tools write '\\', others './', macOS another Unicode form.

    Raises:
        UserError: in too many folders, which would take time that grows with their square, or too long.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    check_depth(parts, where)
    return "/".join(normal(part, where) for part in parts)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or _is_of_macos(name)


def _is_of_macos(name: str) -> bool:
    # It puts '__MACOSX/._name.png', which is not an image, beside every name.png.
    return name.startswith("._") or name == "__MACOSX"


def _count_files(hidden: Path) -> int:
    """The files in a hidden folder; a link counts as one."""
    if hidden.is_symlink():
        return 1
    if _is_of_macos(hidden.name):
        return 0
    return sum(not _is_of_macos(name) for _, _, names in walk(hidden) for name in names)


def _raise_walk_error(error: OSError) -> None:
    raise cannot_use(error.filename, error.strerror or "cannot list it", _ADVICE) from error


def _image_names(files: _Files) -> tuple[list[str], int]:
    """The names of the images, and how many files are none or hidden."""
    names, foreign, others = [], [], []
    for name in tqdm(files.sizes, desc=f"looking at {files.path}", unit="file", delay=2):
        suffix = PurePosixPath(name).suffix.lower()
        kind = "" if suffix in SUFFIXES else format_of(files.head(name))
        if suffix in SUFFIXES or kind in ("PNG", "JPEG"):
            names.append(name)
        elif kind or suffix in _FOREIGN:  # some of these have no first bytes of their own
            foreign.append(name)
        elif name != _LABELS:
            others.append(name)
    if foreign:
        raise UserError(
            f"{files.where(foreign[0])} is neither PNG nor JPEG ({len(foreign):,} such files), and "
            "would be left out. Convert or remove them."
        )
    inner = next((name for name in others if name.lower().endswith(".zip")), None)
    if inner and (isinstance(files, _Zip) or not names):
        raise UserError(
            f"{files.path} contains a ZIP file, {printable(inner, 200)!r}, which is not searched. Give "
            "that file as data.path, after unpacking the outer one if it lies in a ZIP file itself."
        )
    left_out = len(others) + files.hidden
    if not names:
        raise UserError(
            f"{files.path} holds no PNG or JPEG images ({left_out:,} other or hidden files)."
        )
    return names, left_out


def _labels(
    files: _Files, names: Sequence[str], class_folders: bool
) -> tuple[list[int], Sequence[str], str]:
    """Returns (class of each image, class names, origin); both lists are empty without labels."""
    nested = [name for name in files.sizes if PurePosixPath(name).name == _LABELS]
    if class_folders and nested:
        raise UserError(
            f"{files.path} has a {printable(nested[0], 200)}, but data.class_folders asks for labels from "
            "folder names. Remove one of them."
        )
    if class_folders:
        table, class_names, origin = _folder_classes(files, names)
    elif _LABELS in files.sizes:
        origin = _LABELS
        found = _read_dataset_json(files, names)
        if found is None:
            return [], (), 'dataset.json has "labels": null'
        table = found
        class_names = [str(i) for i in range(max(table.values(), default=-1) + 1)]
    elif nested:
        raise UserError(
            f"{files.where(nested[0])} lies below the top of {files.path}, where it is ignored: "
            "give its own folder as data.path, or pack the ZIP without the outer folder."
        )
    else:
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


def _folder_classes(files: _Files, names: Sequence[str]) -> tuple[dict[str, int], list[str], str]:
    """Returns ({name: class}, class names, origin) by the folders that the images lie in."""
    parents = [name.split("/")[:-1] for name in names]
    outer: list[str] = []  # folders around all the class folders, such as the one that was packed
    depth, prefix, there = 0, "", _inside(files, "")
    # One beside others is a class, be they empty: they are named below.
    while len(there) == 1 and all(len(p) > depth + 1 for p in parents):
        outer += there
        depth, prefix = depth + 1, "/".join(outer) + "/"
        there = _inside(files, prefix)
    folders = {
        name: parent[depth]
        for name, parent in zip(names, parents, strict=True)
        if len(parent) > depth
    }
    class_names = _in_order(set(folders.values()))
    empty = _in_order(there - set(class_names))
    if empty:
        raise UserError(
            f"{files.where(prefix + empty[0])} is a class folder without images ({len(empty):,} such "
            "folders), which would get no class number. Add its images, or remove it."
        )
    if len(class_names) == 1 and len(folders) == len(names):
        raise UserError(
            f"All images lie in {files.where(prefix + class_names[0])}, but data.class_folders needs at "
            "least two class folders. Set data.class_folders=False, or give each class a folder."
        )
    if class_names and {name.lower() for name in class_names} <= _SPLITS:
        raise UserError(
            f"{files.where(prefix)} holds the folders {', '.join(class_names)}, which look like the parts "
            "of a data set and not like its classes. Give one of them as data.path, and another as "
            "data.eval_path, or rename them."
        )
    if no_text := [name for name in class_names if not is_text(name)]:
        raise UserError(
            f"{files.where(prefix + no_text[0])} is a class folder whose name is no UTF-8, so that a run "
            f"cannot record it ({len(no_text):,} such folders). Rename it."
        )
    if len(class_names) > _MAX_CLASSES:
        raise UserError(
            f"{files.path} has {len(class_names):,} class folders; at most {_MAX_CLASSES:,} are supported."
        )
    ids = {folder: i for i, folder in enumerate(class_names)}
    origin = "names of the folders" + (f" in {printable('/'.join(outer), 200)}" if outer else "")
    return {name: ids[folder] for name, folder in folders.items()}, class_names, origin


def _inside(files: _Files, prefix: str) -> set[str]:
    """The names of the folders that lie directly in one; prefix is its path with a '/', or ''."""
    below = (f[len(prefix) :] for f in files.folders if f.startswith(prefix))
    return {path.split("/", 1)[0] for path in below} - {"", "."}


def _in_order(names: Collection[str]) -> list[str]:
    """Names in natural order: numbers by their values where all are, else as `_natural` has it."""
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (Decimal(name), name))
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple:
    """A key that sorts 2 before 10: text as text, runs of digits as numbers."""
    parts: list[Any] = re.split(r"([0-9]+)", name)
    parts[1::2] = [(len(number), number) for number in (d.lstrip("0") for d in parts[1::2])]
    return tuple(parts), name


def _read_dataset_json(files: _Files, names: Sequence[str]) -> dict[str, int] | None:
    """Returns {name: class}, or None for {"labels": null}; a UserError says what is malformed."""
    where = files.where(_LABELS)
    expected = 'expected {"labels": [["name.png", 0], ...]} or {"labels": null}'
    # What labels for these images can take: an entry each, any character escaped, on lines of its own.
    limit = (1 << 20) + sum(100 + 6 * len(name) for name in names)
    values = 10_000 + sum(8 + len(name) // 4 for name in names)
    content = parse_json(files.read(_LABELS, limit), where, limit=limit, values=values)
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
                name = _spelled(name, where)
            case _:
                raise UserError(
                    f"{where}: entry {i} of 'labels' is {_shown(entry)}; expected [name, class] with a "
                    f"class from 0 to {_MAX_CLASSES - 1}."
                )
        if table.setdefault(name, label) != label:
            raise UserError(
                f"{where} gives {printable(name, 200)!r} the classes {table[name]} and {label}."
            )
    return table


def _shown(entry: Any) -> str:
    return printable(json.dumps(entry)[:80])
