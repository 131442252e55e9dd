"""The built-in data set: scikit-learn's 1,797 real handwritten digits as a TFDS builder."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lora_diffusion_jax.files import disk_errors

NUM_TEST = 297


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 gray digits, 10 classes, 1,500 for training and 297 for testing.

    The images are scikit-learn's `load_digits`, the test part of "Optical Recognition of
    Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI repository 1998, CC BY 4.0). Their pixels 0..16
    are scaled to 0..255 and rounded. See split_indices for the split.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "1,500 training and 297 test images."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's 1,797 handwritten digits, 8x8, gray, 10 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        from sklearn.datasets import load_digits  # takes a second to import; needed only here

        images, labels = load_digits(return_X_y=True)
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        train, test = split_indices(labels)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices.tolist():
            # A file object of encoded bytes: TFDS would import TensorFlow to encode an array.
            file = io.BytesIO()
            Image.fromarray(images[i]).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": int(labels[i])}


def split_indices(labels: np.ndarray, num_test: int = NUM_TEST) -> tuple[np.ndarray, np.ndarray]:
    """Splits N examples into train and test, always the same way, with equal class shares.

    Each class gives its share of num_test (largest remainders, ties to the lower class), spread
    evenly over the class's examples in their given order. No random numbers: the order follows the
    writers, so every writer's hand is in both parts.

    Args:
        labels: [N] classes.
        num_test: size of the test part.

    Returns:
        (train, test), ascending indices [N - num_test] and [num_test].
    """
    classes, counts = np.unique(labels, return_counts=True)
    share = counts * num_test / len(labels)
    quota = np.floor(share).astype(int)
    short = np.argsort(-(share - quota), kind="stable")[: num_test - quota.sum()]
    quota[short] += 1
    is_test = np.zeros(len(labels), bool)
    for name, count, taken in zip(classes, counts, quota, strict=True):
        # Member j is taken where floor(j * taken / count) steps up: taken of count, evenly.
        steps = np.arange(count + 1) * taken // count
        is_test[np.flatnonzero(labels == name)[np.diff(steps) > 0]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def prepare(data_dir: str | Path) -> Path:
    """Prepares `digits` below data_dir unless it is there, and returns its directory.

    Takes about two seconds, no network and no TensorFlow. Everything is written to a scratch
    directory and renamed into place, so several processes may do it at once and a killed one
    leaves nothing half done.

    Raises:
        UserError: data_dir cannot be written.
    """
    target = Path(data_dir).expanduser() / "digits" / str(Digits.VERSION)
    if _is_prepared(target):
        return target
    advice = "Choose a directory you can write with data.data_dir or TFDS_DATA_DIR."
    with disk_errors(target.parent, advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=target.parent) as scratch:
            _prepare_into(scratch)
            try:
                os.rename(Path(scratch, "digits", target.name), target)
            except OSError:  # another process was first: its directory is as good as ours
                if not _is_prepared(target):
                    raise
    return target


def _prepare_into(directory: str) -> None:
    silence = io.StringIO()  # TFDS prints a banner and three progress bars for 200 kB of data
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        Digits(data_dir=directory, file_format="array_record").download_and_prepare()


def _is_prepared(directory: Path) -> bool:
    return (directory / "dataset_info.json").is_file() and (directory / "features.json").is_file()
