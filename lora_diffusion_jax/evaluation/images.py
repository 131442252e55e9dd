"""Images to evaluate: batches of a source, and an npz of samples as a source."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import tree_hash
from lora_diffusion_jax.npz import read_npz

ARRAYS = ("images", "samples", "arr_0")  # our name, and those of other samplers
CHUNK = 250  # images read at a time


def open_npz(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the images of an npz file, uint8 [N, H, W, C].

    The array is named `images` (main.py --mode=sample), `samples` or `arr_0`; gray images may
    lack their channel axis.

    Raises:
        UserError: no such file, or other content.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected an npz of images.")
    expected = f"images uint8 [N, H, W, C] named {', '.join(ARRAYS[:-1])} or {ARRAYS[-1]}"
    names, arrays = read_npz(path, lambda name: name in ARRAYS, expected)
    if {"mu", "sigma"} <= set(names):
        raise UserError(
            f"{path} holds reference statistics (mu, sigma), not images. Pass it with --ref."
        )
    found = [name for name in ARRAYS if name in arrays]
    if not found:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{path} has the arrays {shown or 'none'}; expected {expected}.")
    images = arrays[found[0]]
    images = images[..., None] if images.ndim == 3 else images
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[-1] not in (1, 3)
        or min(images.shape) == 0
    ):
        raise UserError(
            f"{path} holds {images.dtype} images of shape {images.shape}; expected uint8 "
            "[N, height, width, 1 or 3]. Convert integers 0-255 with astype(uint8), samples in "
            "[-1, 1] with clip(x * 127.5 + 128, 0, 255).astype(uint8), and channels-first arrays "
            "with transpose(0, 2, 3, 1)."
        )
    return images


class ArraySource:
    """Images in memory behind the Source protocol.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int [N], or None.
        image_shape: (H, W, C).
        num_classes: 0 without labels.
        class_names: the class numbers as text.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        self.images, self.labels = images, labels
        self.image_shape = tuple(images.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.class_names: Sequence[str] = tuple(map(str, range(self.num_classes)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label = 0 if self.labels is None else self.labels[index]
        return {"image": self.images[index], "label": np.int32(label)}

    def fingerprint(self) -> str:
        """Hex digits that identify images and labels."""
        return tree_hash({"images": self.images, "labels": self.labels})


def source_batches(
    source: Source, count: int | None = None, *, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yields uint8 batches [n, H, W, C] of the images skip .. skip + count - 1 of a source."""
    stop = len(source) if count is None else min(len(source), skip + count)
    for start in range(skip, stop, CHUNK):
        yield np.stack([source[i]["image"] for i in range(start, min(start + CHUNK, stop))])


def noise_batches(shape: tuple[int, int, int], count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields uint8 batches [n, H, W, C] of `count` images of independent uniform bytes."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        yield rng.integers(0, 256, (min(CHUNK, count - start), *shape), np.uint8)


def first_images(batches: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yields the first `count` images of an iterable of batches; UserError if there are fewer."""
    left = count
    for batch in batches:
        part = np.asarray(batch)[:left]
        left -= len(part)
        yield part
        if left == 0:
            return
    raise UserError(f"{count} images were requested, but there are only {count - left}.")
