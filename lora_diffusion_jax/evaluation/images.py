"""Images to evaluate: an npz of samples as a source, batches, and the check of how many there are."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import tree_hash
from lora_diffusion_jax.evaluation.npz import read_npz

ARRAYS = ("images", "samples", "arr_0")  # ours, and what other samplers call theirs
CHUNK = 250  # images read at a time


def open_npz(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the images of an npz file, uint8 [N, H, W, C]; every other content is a UserError.

    The array is named `images` (main.py --mode=sample), `samples` or `arr_0`; gray images may
    come without their channel axis.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected an npz of images.")
    expected = f"images uint8 [N, H, W, C] under one of the names {', '.join(ARRAYS)}"
    names, arrays = read_npz(path, lambda name: name in ARRAYS, expected)
    if {"mu", "sigma"} <= set(names):
        raise UserError(
            f"{path} holds reference statistics (mu, sigma), not images. Pass it with --ref."
        )
    found = [name for name in ARRAYS if name in arrays]
    if not found:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{path} has the arrays {shown or 'none'}; expected {expected}.")
    return _checked(path, arrays[found[0]])


def _checked(path: Path, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    expected = "expected uint8, 0-255, [N, height, width, channels] with 1 or 3 channels"
    if images.dtype.kind == "f":
        bad = ~np.isfinite(images).reshape(len(images), -1).all(axis=1) if images.size else []
        raise UserError(
            f"{path} holds {images.dtype} images ({int(np.sum(bad))} of them with NaN or infinity); "
            f"{expected}. Convert samples in [-1, 1] with clip(x * 127.5 + 128, 0, 255)."
        )
    if images.dtype != np.uint8:
        raise UserError(
            f"{path} holds {images.dtype} images of shape {images.shape}; {expected}. If the values "
            "are 0-255 already, save images.astype(numpy.uint8)."
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        raise UserError(
            f"{path} holds images of shape {images.shape}; {expected}."
            + (" Save images.transpose(0, 2, 3, 1)." if first else "")
        )
    if not len(images):
        raise UserError(f"{path} holds no images.")
    return images


def check_count(found: int, wanted: int | None, where: str) -> None:
    """Raises UserError unless there are exactly as many images as asked for, and at least 2."""
    if min(found, found if wanted is None else wanted) < 2:
        named = "" if wanted is None else f" (--num={wanted})"
        raise UserError(f"{where}: {found} images{named}; a distance needs at least 2.")
    if wanted is not None and found < wanted:
        raise UserError(
            f"{where} holds {found} images, fewer than the {wanted} asked for (--num). Make the "
            "missing ones, or leave --num out to judge those that are there."
        )
    if wanted is not None and found > wanted:
        raise UserError(
            f"{where} holds {found} images, but --num={wanted}. A distance over a part of them is "
            "not silently taken: leave --num out, or give exactly the images to be judged."
        )


class ArraySource:
    """Images in memory behind the Source protocol.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int [N], or None.
      image_shape: (H, W, C).
      num_classes: 0 without labels.
      class_names: the numbers as words.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        self.images, self.labels = images, labels
        self.image_shape = tuple(images.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.class_names = tuple(map(str, range(self.num_classes)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label = 0 if self.labels is None else self.labels[index]
        return {"image": self.images[index], "label": np.int32(label)}

    def fingerprint(self) -> str:
        """Hex digits that identify the content: the hash of images and labels."""
        return tree_hash({"images": self.images, "labels": self.labels})


def source_batches(
    source: Source, count: int | None = None, *, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yields uint8 batches [n, H, W, C] of the images skip .. skip + count - 1 of a source."""
    stop = len(source) if count is None else min(len(source), skip + count)
    for start in range(skip, stop, CHUNK):
        yield np.stack([source[i]["image"] for i in range(start, min(start + CHUNK, stop))])


def newest_change(path: str | os.PathLike[str]) -> int:
    """When a file, or anything below a folder, last changed: nanoseconds since 1970."""
    paths = [Path(path), *Path(path).rglob("*")]
    return max(p.lstat().st_mtime_ns for p in paths)  # links may lead nowhere
