"""Images to evaluate: an npz of samples as a source, and the check of how many there are."""

import os
import zipfile
from pathlib import Path

import numpy as np

from lora_diffusion_jax.errors import UserError

ARRAYS = ("images", "samples", "arr_0")  # ours, and what other samplers call theirs


def open_npz(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the images of an npz file, uint8 [N, H, W, C]; every other content is a UserError.

    The array is named `images` (main.py --mode=sample), `samples` or `arr_0`; gray images may
    come without their channel axis.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected an npz of images.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            found = [name for name in ARRAYS if name in names]
            images = file[found[0]] if found else None
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file ({error}).") from error
    if {"mu", "sigma"} <= set(names):
        raise UserError(
            f"{path} holds reference statistics (mu, sigma), not images. Pass it with --ref."
        )
    if images is None:
        raise UserError(
            f"{path} has the arrays {', '.join(names) or 'none'}; expected images uint8 "
            f"[N, H, W, C] under one of the names {', '.join(ARRAYS)}."
        )
    return _checked(path, images)


def _checked(path: Path, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype.kind == "f":
        bad = int(np.isnan(images).reshape(len(images), -1).any(axis=1).sum()) if images.size else 0
        found = f"{bad} of them with NaN" if bad else "none with NaN"
        raise UserError(
            f"{path} holds {images.dtype} images ({found}); expected uint8, 0-255. Convert samples "
            "in [-1, 1] with clip(x * 127.5 + 128, 0, 255)."
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{path} holds {images.dtype} images of shape {images.shape}; expected uint8 "
            "[N, height, width, channels] with 1 or 3 channels."
        )
    if not len(images):
        raise UserError(f"{path} holds no images.")
    return images


def check_count(found: int, wanted: int | None, where: str) -> None:
    """Raises UserError unless there are exactly as many images as asked for."""
    if wanted is not None and found < wanted:
        raise UserError(f"{where} holds {found} images, fewer than the {wanted} asked for.")
    if wanted is not None and found > wanted:
        raise UserError(
            f"{where} holds {found} images, but --num={wanted}. A distance over a part of them is "
            "not silently taken: leave --num out, or give exactly the images to be judged."
        )


class ArraySource:
    """Images in memory behind the Source protocol; without labels.

    Attributes:
      images: uint8 [N, H, W, C].
      image_shape: (H, W, C).
      num_classes: 0.
      class_names: empty.
    """

    def __init__(self, images: np.ndarray):
        self.images = images
        self.image_shape = tuple(images.shape[1:])
        self.num_classes = 0
        self.class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": np.int32(0)}
