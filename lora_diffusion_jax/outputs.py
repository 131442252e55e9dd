"""Where generated images go: a folder, a .npz, or one picture of all; a kill loses none that is done."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from PIL import Image

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.generate import NO_LABEL, Batch

FILES = (".npz", ".png")  # any other --out is a folder


class Output(Protocol):
    """Takes the images of some seeds, in any number of goes.

    Attributes:
        done: bool [N], which images an earlier, unfinished go has left.
    """

    done: np.ndarray

    def write(self, batch: Batch) -> None:
        """Keeps the images of a batch; they are on disk when this returns."""
        ...

    def finish(self, about: Mapping[str, Any]) -> None:
        """Makes the result, when all images were written."""
        ...


def open_output(
    path: Path,
    seeds: np.ndarray,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    identity: str,
    columns: int = 0,
) -> Output:
    """A folder of PNGs, or what the ending of the path says: .npz, or .png for a grid.

    Args:
        path: where to.
        seeds: of all images, int64 [N], in order.
        labels: of all images, int32 [N].
        image_shape: (height, width, channels).
        identity: what decides the images besides; what an unfinished go of another identity left is
            not used.
        columns: of a grid; 0: as many as rows.
    """
    if path.suffix not in FILES:
        return _Folder(path, seeds, labels, identity)
    return _File(path, seeds, labels, image_shape, identity, columns)


class _Folder:
    """One PNG per image, `000007.png` for seed 7, and labels in `dataset.json`.

    The layout is that of a StyleGAN/EDM data set, so the folder can be trained on and evaluated.
    """

    def __init__(self, folder: Path, seeds: np.ndarray, labels: np.ndarray, identity: str):
        self.folder, self.seeds, self.labels = folder, seeds, labels
        self.state = folder / ".unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = _locked(folder / ".lock", folder)
        if not (self.state.is_file() and self.state.read_text() == identity):
            # What an earlier result left under these names must not pass for this one's.
            for name in ["dataset.json", *map(self._name, seeds)]:
                (folder / name).unlink(missing_ok=True)
            _write_text(self.state, identity)
        there = set(os.listdir(folder))
        self.done = np.array([self._name(seed) in there for seed in seeds])

    def _name(self, seed: int) -> str:
        return f"{seed:06d}.png"

    def write(self, batch: Batch) -> None:
        for image, seed in zip(batch.images, batch.seeds, strict=True):
            write_png(self.folder / self._name(seed), image)

    def finish(self, about: Mapping[str, Any]) -> None:
        labels = [
            [self._name(seed), int(label)]
            for seed, label in zip(self.seeds, self.labels, strict=True)
            if label != NO_LABEL
        ]
        text = json.dumps({"labels": labels or None, "about": dict(about)})
        _write_text(self.folder / "dataset.json", text)
        self.state.unlink()
        _unlock(self.lock, self.folder / ".lock")


class _File:
    """A .npz of images uint8 [N, H, W, C], seeds [N], labels [N] and a JSON text `about`; or a grid.

    Until it is finished, the images lie in FILE.unfinished, one after the other as plain bytes.
    """

    def __init__(
        self,
        path: Path,
        seeds: np.ndarray,
        labels: np.ndarray,
        image_shape: tuple[int, int, int],
        identity: str,
        columns: int,
    ):
        self.path, self.seeds, self.labels = path, seeds, labels
        self.image_shape, self.columns = image_shape, columns
        self.images = path.with_name(path.name + ".unfinished")
        self.state = path.with_name(path.name + ".unfinished.json")
        self.lock = _locked(self._lock_path, path)
        count = 0
        if self.state.is_file() and self.images.is_file() and self.state.read_text() == identity:
            count = self.images.stat().st_size // int(np.prod(image_shape))
        else:
            self.state.unlink(missing_ok=True)  # first: images of another identity must not stay
            self.images.write_bytes(b"")
            _write_text(self.state, identity)
        os.truncate(self.images, count * int(np.prod(image_shape)))
        self.done = np.arange(len(seeds)) < count

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def write(self, batch: Batch) -> None:
        with self.images.open("ab") as file:
            file.write(np.ascontiguousarray(batch.images).tobytes())

    def finish(self, about: Mapping[str, Any]) -> None:
        images = np.fromfile(self.images, np.uint8).reshape(-1, *self.image_shape)
        if self.path.suffix == ".png":
            columns = self.columns or int(np.ceil(len(images) ** 0.5))
            write_png(self.path, grid(images, columns))
        else:
            whole = Batch(images, self.seeds, self.labels)
            with _whole_or_not(self.path) as partial, partial.open("wb") as file:
                np.savez_compressed(file, **whole._asdict(), about=json.dumps(dict(about)))
        self.images.unlink()
        self.state.unlink()
        _unlock(self.lock, self._lock_path)


def _locked(lock: Path, output: Path) -> TextIO:
    """A lock on an output, which dies with the process; UserError where another holds it."""
    file = lock.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"Another process is writing {output}; wait for it, or choose another --out."
        ) from error
    return file


def _unlock(file: TextIO, lock: Path) -> None:
    lock.unlink(missing_ok=True)
    file.close()


@contextlib.contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """Gives where to write a file that gets its own name when it is whole."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def _write_text(path: Path, text: str) -> None:
    with _whole_or_not(path) as partial:
        partial.write_text(text)


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 image [H, W, 1 or 3] for writing."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(images: np.ndarray, columns: int, *, least_side: int = 48, gap: int = 4) -> np.ndarray:
    """Tiles uint8 images [N, H, W, C] row by row on gray; small ones are enlarged by a whole factor."""
    factor = max(1, -(-least_side // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full(
        (gap + rows * (height + gap), gap + columns * (width + gap), channels), 96, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes one uint8 image as a PNG that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole_or_not(path) as partial:
        to_pil(image).save(partial, format="PNG")
