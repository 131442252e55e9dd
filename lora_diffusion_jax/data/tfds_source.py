"""Prepared TFDS data sets, read from array_record files without TensorFlow or dataset code."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.decode import Shape, read_shape
from lora_diffusion_jax.data.image_source import (
    EncodedImage,
    ImageSource,
    common_shape,
    evenly_spaced,
)
from lora_diffusion_jax.errors import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource(ImageSource):
    """One split of a prepared TFDS data set of images; `digits` is prepared on first use.

    The image and the label are the data set's supervised keys where they are an Image and a
    ClassLabel; otherwise its one Image feature (or 'image'), and 'label' or its one ClassLabel.

    Args:
        name: 'name' or 'name/config'; ':1.2.3' appended selects a version, else the newest is read.
        data_dir: where prepared data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        split: a split or a slice of one in TFDS's notation, such as 'train[:90%]'.

    Raises:
        UserError: not prepared, not in array_record, damaged, no image feature, no such split.
    """

    converts = True  # the data set declares its channels; ImageNet's gray JPEGs are meant as colour

    def __init__(self, name: str, *, data_dir: str = "", split: str = "train") -> None:
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        root = Path(root).expanduser()
        self._directory = digits.prepare(root) if name == "digits" else _find(name, root)
        self._split = split
        self._open()
        self.title = f"TFDS {self._info.full_name}, split {split}, in {self._directory}"
        label = self._info.features[self._label_key] if self._label_key else None
        self.num_classes = label.num_classes if label else 0
        self.class_names = tuple(label.names) if label else ()
        self.label_origin = (
            f"feature {self._label_key!r}" if label else "the data set has no class label"
        )
        paths = [Path(path) for path in self._info.splits[split].filepaths]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]} is missing: {self._info.full_name} is incomplete. Prepare it again "
                "or restore the file."
            )
        self.bytes_on_disk = sum(path.stat().st_size for path in paths)
        self.image_shape = self._find_shape()

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Sequence[int]) -> list[EncodedImage]:
        try:
            examples = self._data.__getitems__([int(i) for i in indices])
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            # array_record and the example parser have no exception classes of their own.
            raise UserError(
                f"cannot read {self.title}: {str(error).splitlines()[0]}. Its files are damaged or "
                "incomplete: prepare the data set again."
            ) from error
        return [
            EncodedImage(
                example[self._image_key],
                int(example[self._label_key]) if self._label_key else 0,
                f"image {i} of {self.title}",
            )
            for i, example in zip(indices, examples, strict=True)
        ]

    def _identity(self) -> Sequence[str]:
        return self._info.full_name, self._split, *self.class_names

    def __getstate__(self) -> dict[str, Any]:
        reopened = ("_info", "_data", "_image_key", "_label_key")
        return {key: value for key, value in self.__dict__.items() if key not in reopened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        builder = _builder(self._directory)
        self._info = info = builder.info
        try:
            count = info.splits[self._split].num_examples
        except ValueError as error:  # TFDS's message lists the splits, or explains the slice
            raise UserError(f"{info.full_name}: {str(error).splitlines()[0]}") from error
        if count == 0:
            sizes = ", ".join(
                f"{key} ({split.num_examples:,})" for key, split in info.splits.items()
            )
            raise UserError(
                f"split {self._split!r} of {info.full_name} holds no images; its splits are {sizes}."
            )
        self._image_key, self._label_key = _image_and_label(info)
        # Images come out encoded: one decoder serves all sources and names the image that is broken.
        skip = {
            key: tfds.decode.SkipDecoding()
            for key, feature in info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._data = builder.as_data_source(split=self._split, decoders=skip)

    def _find_shape(self) -> Shape:
        height, width, channels = self._info.features[self._image_key].shape
        sample = self.fetch(evenly_spaced(len(self), 64))  # also shows that the files can be read
        if height is None or width is None:
            headers = [read_shape(io.BytesIO(image.data), image.where) for image in sample]
            channels = channels or headers[0][2]
            height, width, _ = common_shape(
                ((*header[:2], channels), image.where)
                for header, image in zip(headers, sample, strict=True)
            )
        if channels not in (1, 3):
            raise UserError(
                f"the images of {self._info.full_name} have {channels} channels; expected 1 (gray) or "
                "3 (colour)."
            )
        return height, width, channels


def _builder(directory: Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS passes on whatever its parsers of two JSON files raise
        raise UserError(
            f"{directory} is not a complete prepared TFDS data set: {str(error).splitlines()[0]} "
            "Prepare it again."
        ) from error
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        name = "/".join(builder.info.full_name.split("/")[:-1])
        raise UserError(
            f"{directory} holds {builder.info.full_name} as "
            f"{getattr(file_format, 'value', file_format)}, which has no random access without "
            "TensorFlow; expected array_record. Prepare it again, in another directory:\n"
            f"{_command(name, 'NEW_DATA_DIR')}"
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

    def choose(preferred: str, keys: list[str]) -> str:
        return preferred if preferred in keys else keys[0] if len(keys) == 1 else ""

    image = choose("image", images)
    if not image:
        raise UserError(
            f"{info.full_name} has {len(images)} image features; expected one. Its features are "
            f"{', '.join(features) or info.features}."
        )
    return image, choose("label", labels)


def _find(name: str, root: Path) -> Path:
    """The directory root/name/[config/]version, or an error that lists what is there."""
    path, _, version = name.partition(":")
    if not re.fullmatch(r"\w+(/[\w.\-+]+)?", path):
        raise UserError(
            f"data.name {name!r} is not a TFDS name; expected 'name', 'name/config' or 'name:1.2.3'."
        )
    children = _folders(root / path)
    versions = sorted(
        (child for child in children if _VERSION.fullmatch(child)),
        key=lambda text: tuple(map(int, text.split("."))),
    )
    if version in versions or (versions and not version):
        return root / path / (version or versions[-1])
    configs = [f"{path}/{child}" for child in children if _folders(root / path / child)]
    if configs and not versions and "/" not in path:
        raise UserError(
            f"{name!r} in {root} has several configurations; set data.name to one of them: "
            f"{', '.join(configs)}."
        )
    found = ", ".join(versions or _folders(root)) or (
        "nothing" if root.is_dir() else "no such folder"
    )
    raise UserError(
        f"{name!r} is not prepared in {root} (found: {found}). If it lies elsewhere, set "
        f"data.data_dir; for your own images set data.path. To prepare it:\n{_command(name, root)}"
    )


def _command(name: str, root: Path | str) -> str:
    return (
        "  pip install tensorflow   # for the preparation only; training does not need it\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        f"data_dir='{root}', file_format='array_record').download_and_prepare()\""
    )


def _folders(path: Path) -> list[str]:
    try:
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
