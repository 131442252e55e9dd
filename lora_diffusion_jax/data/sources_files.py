"""Image folders and ZIP files in the layout of StyleGAN and EDM, read in place."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from lora_diffusion_jax.data.containers import Container, open_container
from lora_diffusion_jax.data.decode import describe_shape, read_shape
from lora_diffusion_jax.data.image_source import ImageSource, Record, spaced
from lora_diffusion_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FOREIGN = (".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy", ".heic", ".ppm", ".pgm", ".jp2")
_MAX_HEADERS = 100_000  # headers looked at when opening (0.1 ms each); evenly spaced beyond
_MAX_CLASSES = 100_000


def open_files(path: str | Path, *, class_folders: bool = False) -> "FileSource":
    """Opens a folder or a ZIP file of PNG or JPEG images; nested directories are searched.

    The images are in sorted order of their names. Labels come from a `dataset.json` at the top,
    {"labels": [["a/b.png", 3], ...]} with the file's name from the top and its class, or
    {"labels": null} for none. Without it there are none, unless class_folders is set: then the
    first directory of a name is its class, numbered in sorted order. Hidden files are left out.

    Raises:
        UserError: nothing to read, damaged or mixed images, labels that do not fit.
    """
    container = open_container(path)
    names = _image_names(container)
    labels, class_names, origin = _labels(container, names, class_folders)
    return FileSource(container, names, labels, class_names, origin)


class FileSource(ImageSource):
    """Images in a folder or a ZIP file; see open_files.

    Args:
        container: where the files lie.
        names: the images' names in it, in order.
        labels: their classes, or none for a data set without labels.
        class_names: one per class; empty without labels.
        label_origin: where the labels come from, for people.
    """

    def __init__(
        self,
        container: Container,
        names: Sequence[str],
        labels: Sequence[int],
        class_names: Sequence[str],
        label_origin: str,
    ) -> None:
        self._container, self._names, self._labels = container, names, labels
        self.title = f"images in {container.path}"
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.label_origin = label_origin
        self.bytes_on_disk = sum(container.sizes[name] for name in names)
        self.image_shape = self._check_headers()

    def __len__(self) -> int:
        return len(self._names)

    def records(self, indices: Sequence[int]) -> list[Record]:
        names = [self._names[i] for i in indices]
        return [
            Record(
                self._container.read(name),
                self._labels[i] if self._labels else 0,
                self._container.where(name),
            )
            for i, name in zip(indices, names, strict=True)
        ]

    def labels(self) -> np.ndarray:
        return np.array(self._labels or [0] * len(self), np.int32)  # known without the files

    def _identity(self) -> Sequence[str]:
        sizes = self._container.sizes
        labels = self._labels or [0] * len(self)
        return [
            f"{name} {sizes[name]} {label}" for name, label in zip(self._names, labels, strict=True)
        ]

    def _check_headers(self) -> tuple[int, int, int]:
        """Reads the images' headers; UserError names the first that differs from the first one."""
        expected = None
        for i in tqdm(
            spaced(len(self), _MAX_HEADERS),
            desc=f"checking {self._container.path}",
            unit="img",
            delay=2,
        ):
            where = self._container.where(self._names[i])
            try:
                with self._container.open(self._names[i]) as file:
                    shape = read_shape(file, where)
            except (BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{where} is damaged: {error}. Replace or remove it.") from error
            expected = expected or shape
            if shape != expected:
                raise UserError(
                    f"{where} is {describe_shape(shape)}, but "
                    f"{self._container.where(self._names[0])} is {describe_shape(expected)}. All "
                    "images must have one size and one number of channels: resize or convert them "
                    "first."
                )
        return expected


def _image_names(container: Container) -> list[str]:
    names = [name for name in container.sizes if name.lower().endswith(_SUFFIXES)]
    foreign = [name for name in container.sizes if name.lower().endswith(_FOREIGN)]
    if foreign:
        raise UserError(
            f"{container.where(foreign[0])} is neither PNG nor JPEG ({len(foreign):,} "
            "such files), and would be left out. Convert or remove them."
        )
    if not names:
        zips = [name for name in container.sizes if name.lower().endswith(".zip")]
        hint = f" It holds {zips[0]!r}: give that file as data.path." if zips else ""
        raise UserError(
            f"{container.path} holds no PNG or JPEG images "
            f"({len(container.sizes):,} other files).{hint}"
        )
    return names


def _labels(
    container: Container,
    names: Sequence[str],
    class_folders: bool,
) -> tuple[list[int], tuple[str, ...], str]:
    """Returns (labels, class names, origin); both lists are empty without labels."""
    has_json = "dataset.json" in container.sizes
    if class_folders:
        if has_json:
            raise UserError(
                f"{container.path} has a dataset.json, and data.class_folders asks for "
                "labels from folder names. Remove one of them."
            )
        return _folder_labels(container, names)
    if not has_json:
        nested = [name for name in container.sizes if PurePosixPath(name).name == "dataset.json"]
        if nested:
            raise UserError(
                f"{container.where(nested[0])} lies below the top of {container.path}, "
                "where it is not looked for: give its own folder as data.path, or pack "
                "the ZIP without the outer folder."
            )
        return [], (), "no dataset.json, so no labels"
    table = _read_dataset_json(container)
    if table is None:
        return [], (), "dataset.json says there are none"
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(
            f"{container.where(missing[0])} has no label in dataset.json "
            f"({len(missing):,} of {len(names):,} images have none). Add them, or "
            'write {"labels": null} for a data set without labels.'
        )
    extra = table.keys() - set(names)
    if extra:
        raise UserError(
            f"dataset.json labels {container.where(min(extra))}, which is not there "
            f"({len(extra):,} such names). Restore the images or drop their labels."
        )
    labels = [table[name] for name in names]
    return labels, tuple(str(i) for i in range(max(labels) + 1)), "dataset.json"


def _folder_labels(
    container: Container,
    names: Sequence[str],
) -> tuple[list[int], tuple[str, ...], str]:
    top = [name for name in names if "/" not in name]
    if top:
        raise UserError(
            f"{container.where(top[0])} lies in no class's folder ({len(top):,} such "
            "images), but data.class_folders takes the first folder as the class."
        )
    folders = [name.split("/")[0] for name in names]
    classes = tuple(sorted(set(folders)))
    ids = {folder: i for i, folder in enumerate(classes)}
    return [ids[folder] for folder in folders], classes, "names of the folders"


def _read_dataset_json(container: Container) -> dict[str, int] | None:
    """Returns {name: class}, or None for {"labels": null}; UserError says what is malformed."""
    where = container.where("dataset.json")
    expected = 'expected {"labels": [["name.png", 0], ...]} or {"labels": null}'
    try:
        content = json.loads(container.read("dataset.json"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{where} is not JSON ({error}); {expected}.") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f"{where} has no 'labels'; {expected}.")
    entries = content["labels"]
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f"{where}: 'labels' is a {type(entries).__name__}; {expected}.")
    table: dict[str, int] = {}
    for i, entry in enumerate(entries):
        match entry:
            case [str(name), int(label)] if type(label) is int and 0 <= label < _MAX_CLASSES:
                name = name.replace("\\", "/")
            case _:
                raise UserError(
                    f"{where}: entry {i} of 'labels' is {json.dumps(entry)[:80]}; "
                    f"expected [name, class] with a class from 0 to {_MAX_CLASSES - 1}."
                )
        if table.setdefault(name, label) != label:
            raise UserError(f"{where} gives {name!r} the classes {table[name]} and {label}.")
    return table
