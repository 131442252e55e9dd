"""Prepared TFDS data sets, read from array_record files without TensorFlow or dataset code."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format

from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.decode import describe_shape, read_shape
from lora_diffusion_jax.data.image_source import ImageSource, Record, spaced
from lora_diffusion_jax.errors import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def default_data_dir() -> Path:
    """Where TFDS looks: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_tfds(name: str, *, data_dir: str = "", split: str = "train") -> "TfdsSource":
    """Opens a prepared TFDS data set; `digits` is prepared on the spot.

    Args:
        name: 'name', 'name/config', with ':1.2.3' for a version; the newest one otherwise.
        data_dir: where prepared data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        split: a split or a slice of one in TFDS's notation, such as 'train[:90%]'.

    Raises:
        UserError: not prepared, not in array_record, damaged, no image, no such split.
    """
    root = Path(data_dir).expanduser() if data_dir else default_data_dir()
    if name == "digits":
        return TfdsSource(digits.prepare(root), split)
    return TfdsSource(_find(name, root), split)


class TfdsSource(ImageSource):
    """One split of a prepared TFDS data set of images.

    The image and the label are the data set's supervised keys where they are an Image and a
    ClassLabel; else its one Image feature (or 'image'), and 'label' or its one ClassLabel.

    Args:
        directory: the version's directory, holding dataset_info.json and array_record files.
        split: a split or slice in TFDS's notation.
    """

    converts = True  # the data set declares its channels; ImageNet's gray JPEGs are meant as colour

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = Path(directory), split
        self._open()
        info = self._info
        self.title = f"TFDS {info.full_name}, split {split}, in {directory}"
        label = info.features[self._label_key] if self._label_key else None
        self.num_classes = label.num_classes if label else 0
        self.class_names = tuple(label.names) if label else ()
        self.label_origin = (
            f"feature {self._label_key!r}" if label else "the data set has no class label"
        )
        paths = [Path(path) for path in info.splits[split].filepaths]
        for path in paths:
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: {info.full_name} is incomplete. "
                    "Prepare it again or restore the file."
                )
        self.bytes_on_disk = sum(path.stat().st_size for path in paths)
        self.image_shape = self._find_shape()

    def __len__(self) -> int:
        return len(self._data)

    def records(self, indices: Sequence[int]) -> list[Record]:
        try:
            examples = self._data.__getitems__([int(i) for i in indices])
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            # array_record and the example parser have no exception classes of their own.
            raise UserError(
                f"cannot read {self.title}: {str(error).splitlines()[0]}. Its files "
                "are damaged or incomplete: prepare the data set again."
            ) from error
        return [
            Record(
                example[self._image_key],
                int(example[self._label_key]) if self._label_key else 0,
                f"image {i} of {self.title}",
            )
            for i, example in zip(indices, examples, strict=True)
        ]

    def _identity(self) -> Sequence[str]:
        return self._info.full_name, self._split, *self.class_names

    def __getstate__(self) -> dict[str, Any]:
        own = ("_info", "_data", "_image_key", "_label_key")  # opened anew in the other process
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        builder = _builder(self._directory)
        self._info = builder.info
        try:
            count = self._info.splits[self._split].num_examples
        except ValueError as error:  # TFDS says which splits or slices there are
            raise UserError(f"{self._info.full_name}: {str(error).splitlines()[0]}") from error
        if count == 0:
            raise UserError(
                f"split {self._split!r} of {self._info.full_name} holds no images; "
                f"there are {_split_sizes(self._info)}."
            )
        self._image_key, self._label_key = _image_and_label(self._info)
        # Images come out encoded: one decoder serves all sources and says which image is broken.
        skip = {
            key: tfds.decode.SkipDecoding()
            for key, feature in self._info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._data = builder.as_data_source(split=self._split, decoders=skip)

    def _find_shape(self) -> tuple[int, int, int]:
        height, width, channels = self._info.features[self._image_key].shape
        sample = self.records(spaced(len(self), 64))  # also shows that the shards can be read
        if height is None or width is None:
            shapes = [read_shape(io.BytesIO(record.data), record.where) for record in sample]
            for shape, record in zip(shapes, sample, strict=True):
                if shape[:2] != shapes[0][:2]:
                    raise UserError(
                        f"{record.where} is {describe_shape(shape)} but image 0 is "
                        f"{describe_shape(shapes[0])}: {self._info.full_name} holds images of "
                        "several sizes. Write them at one size to a folder or ZIP and use "
                        "data.path."
                    )
            height, width = shapes[0][:2]
            channels = channels or shapes[0][2]
        if channels not in (1, 3):
            raise UserError(
                f"the images of {self._info.full_name} have {channels} channels; "
                "expected 1 (gray) or 3 (colour)."
            )
        return height, width, channels


def _builder(directory: Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(directory)
    except (
        ValueError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        json_format.ParseError,
    ) as error:
        raise UserError(
            f"{directory} is no complete prepared TFDS data set: "
            f"{str(error).splitlines()[0]} Prepare it again."
        ) from error
    found = builder.info.file_format
    if found is None or found.value != "array_record":
        name = "/".join(builder.info.full_name.split("/")[:-1])
        raise UserError(
            f"{directory} holds {builder.info.full_name} as {getattr(found, 'value', found)}, "
            "which cannot be read at random without TensorFlow; expected array_record. Prepare it "
            f"once more, into another directory:\n{_command(name, 'NEW_DATA_DIR')}"
        )
    return builder


def _image_and_label(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Names of the image and the label feature; '' for no label."""
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [
        key
        for key, f in features.items()
        if isinstance(f, tfds.features.ClassLabel) and f.num_classes
    ]
    keys = info.supervised_keys
    if isinstance(keys, tuple) and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    if not image:
        raise UserError(
            f"{info.full_name} has {len(images)} image features; expected one. Its "
            f"features are {', '.join(features) or info.features}."
        )
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
    return image, label


def _find(name: str, root: Path) -> Path:
    """The directory root/name/[config/]version, or an error that says what is there."""
    path, _, version = name.partition(":")
    if not re.fullmatch(r"\w+(/[\w.\-+]+)?", path):
        raise UserError(
            f"data.name {name!r} is no TFDS name; expected 'name', 'name/config' or 'name:1.2.3'."
        )
    directory = root / path
    children = _directories(directory)
    versions = sorted(
        (child for child in children if _VERSION.fullmatch(child)),
        key=lambda text: tuple(map(int, text.split("."))),
    )
    if version in versions or (versions and not version):
        return directory / (version or versions[-1])
    if versions:
        raise UserError(
            f"{name!r} is not prepared in {root}; versions there: "
            f"{', '.join(versions)}. To prepare it:\n{_command(name, root)}"
        )
    configs = [f"{path}/{child}" for child in children if _directories(directory / child)]
    if configs and "/" not in path:
        raise UserError(
            f"{name!r} in {root} has several configurations; name one of them in "
            f"data.name: {', '.join(configs)}."
        )
    there = ", ".join(_directories(root)) or ("nothing" if root.is_dir() else "no such directory")
    raise UserError(
        f"data set {name!r} is not prepared in {root} (there: {there}). If it lies elsewhere, say "
        f"so with data.data_dir; your own images go in data.path. To prepare it:\n"
        f"{_command(name, root)}"
    )


def _command(name: str, root: Path | str) -> str:
    return (
        "  pip install tensorflow   # only for this preparation; training needs none\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        f"data_dir='{root}', file_format='array_record').download_and_prepare()\""
    )


def _directories(path: Path) -> list[str]:
    try:
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _split_sizes(info: tfds.core.DatasetInfo) -> str:
    return ", ".join(f"{key} ({split.num_examples:,})" for key, split in info.splits.items())
