"""Prepared TFDS data sets, read from array_record files without TensorFlow or dataset code."""

import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_diffusion_jax import files
from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.chunks import unpacked_sizes
from lora_diffusion_jax.data.decode import MAX_BYTES, Shape, colour, read_shape
from lora_diffusion_jax.data.image_source import (
    EncodedImage,
    EncodedSource,
    common_shape,
    evenly_spaced,
)
from lora_diffusion_jax.errors import NotThereError, UserError, printable
from lora_diffusion_jax.untrusted import (
    normal,
    parse_json,
    read_file,
    read_json,
    reason,
    refusing,
)

_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_ADVICE = "Prepare it again."
_MAX_CLASSES = 100_000
_MAX_NAMES = 4 << 20  # bytes of a file of class names
_MAX_RECORD = MAX_BYTES + (1 << 20)  # an image and what is beside it
_MAX_PACKING = 100  # encoded images hardly pack
_MAX_HEADERS = (
    100_000  # of records, read on opening (10 us each); larger data sets are checked in part
)
_MAX_SHARDS = 10_000  # files of all splits together; TFDS takes a quarter of a millisecond for each
# TFDS imports the module of any other class that a data set's files name, and runs what is in it.
_FEATURES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        *("features_dict.FeaturesDict", "sequence_feature.Sequence", "dataset_feature.Dataset"),
        *("image_feature.Image", "labeled_image.LabeledImage", "video_feature.Video"),
        *("class_label_feature.ClassLabel", "text_feature.Text", "audio_feature.Audio"),
        *("scalar.Scalar", "tensor_feature.Tensor", "feature.Tensor"),
        *("bounding_boxes.BBoxFeature", "translation_feature.Translation"),
        "translation_feature.TranslationVariableLanguages",
    )
}


class TfdsSource(EncodedSource):
    """One split of a prepared TFDS data set of images; `digits` is prepared on first use.

    The image and the label are the data set's supervised keys where they are an Image and a
    ClassLabel; otherwise its one Image feature (or 'image'), and 'label' or its one ClassLabel.

    Args:
        name: 'name' or 'name/config'; ':1.2.3' appended selects a version, else the newest is read.
        data_dir: where prepared data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        split: a split or a slice of one in TFDS's notation, such as 'train[:90%]'.
        background: the colour behind transparent pixels; '' refuses them.

    Raises:
        UserError: not prepared, not in array_record, damaged, features whose classes are not TFDS's
            own, no image feature, no such split.
    """

    converts = True  # the data set declares its channels; ImageNet's gray JPEGs are meant as colour

    def __init__(
        self, name: str, *, data_dir: str = "", split: str = "train", background: str = ""
    ) -> None:
        given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        root = Path(files.expand(given, "data.data_dir" if data_dir else "TFDS_DATA_DIR"))
        self._directory = digits.prepare(root) if name == "digits" else _find(name, root)
        self._split, self.background = split, background
        if background:
            colour(background)
        with refusing(str(self._directory), "read as a TFDS data set", _ADVICE):
            self._open()
            self._describe()

    def _describe(self) -> None:
        """Fills in what all sources have."""
        self.title = f"TFDS {self._full_name}, split {self._split}, in {self._directory}"
        self.class_names = self._read_class_names()
        self.num_classes = len(self.class_names)
        self.label_origin = (
            f"feature {printable(self._label_key)!r}"
            if self._label_key
            else "the data set has no class label"
        )
        paths = [Path(path) for path in self._info.splits[self._split].filepaths]
        for path in paths:
            if path.parent != self._directory:
                raise UserError(
                    f"{self._full_name} names the file {printable(str(path), 300)}, which lies outside "
                    f"{self._directory}. {_ADVICE}"
                )
            if not path.is_file():
                raise UserError(
                    f"{printable(str(path), 300)} is missing: {self._full_name} is incomplete. Prepare it "
                    "again or restore the file."
                )
        self.bytes_on_disk = sum(path.stat().st_size for path in paths)
        self._check_unpacked(paths)
        self.image_shape = self._find_shape()

    def _check_unpacked(self, paths: Sequence[Path]) -> None:
        """Raises UserError for records far larger than images, or together than their files."""
        total = 0
        sizes = ((path, size) for path in paths for size in unpacked_sizes(path))
        for path, size in itertools.islice(sizes, _MAX_HEADERS):
            total += size
            if size > _MAX_RECORD:
                raise UserError(
                    f"{path} holds a record that unpacks to {size:,} bytes; expected at most "
                    f"{_MAX_RECORD:,}. {_ADVICE}"
                )
        if total > _MAX_RECORD + _MAX_PACKING * self.bytes_on_disk:
            raise UserError(
                f"The files of {self._full_name} unpack to {total:,} bytes, far more than the "
                f"{self.bytes_on_disk:,} that they have on disk. {_ADVICE}"
            )

    def _read_class_names(self) -> tuple[str, ...]:
        """One per class: the file beside the data has them, or they are numbers."""
        if not self._label_key:
            return ()
        count = self._info.features[self._label_key].num_classes
        if count > _MAX_CLASSES:
            raise UserError(
                f"{self._full_name} declares {count:,} classes; at most {_MAX_CLASSES:,} are supported."
            )
        path = self._directory / f"{self._label_key.replace('/', '.')}.labels.txt"
        if not path.exists():
            return tuple(map(str, range(count)))
        lines = str(read_file(path, _MAX_NAMES, _ADVICE), "utf-8").split("\n")
        names = tuple(normal(line.strip(), str(path)) for line in lines if line.strip())
        if len(names) != count or len(set(names)) != count:
            raise UserError(
                f"{path} names {len(set(names)):,} classes, but {self._full_name} declares {count:,}. "
                f"{_ADVICE}"
            )
        return names

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Sequence[int]) -> list[EncodedImage]:
        try:
            examples = self._data.__getitems__([int(i) for i in indices])
            return [self._encoded(i, e) for i, e in zip(indices, examples, strict=True)]
        except Exception as error:
            # array_record, its parser and TFDS have no exception classes of their own.
            raise UserError(
                f"cannot read {self.title}: {reason(error)}. Its files are damaged or "
                "incomplete: prepare the data set again."
            ) from error

    def _encoded(self, index: int, example: dict[str, Any]) -> EncodedImage:
        data, label = example[self._image_key], 0
        if type(data) is not bytes:
            raise TypeError(f"image {index} is a {type(data).__name__}")
        if self._label_key:
            label = int(example[self._label_key])
        return EncodedImage(data, label, f"image {index} of {self.title}")

    def _identity(self) -> Sequence[str]:
        identity = (self._info.full_name, self._split, *self.class_names)
        return (*identity, self.background) if self.background else identity

    def __getstate__(self) -> dict[str, Any]:
        reopened = ("_info", "_data", "_image_key", "_label_key")
        return {key: value for key, value in self.__dict__.items() if key not in reopened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        builder = _builder(self._directory)
        self._info = info = builder.info
        self._full_name = printable(info.full_name, 200)
        try:
            count = info.splits[self._split].num_examples
        except ValueError as error:  # TFDS's message lists the splits, or explains the slice
            raise UserError(f"{self._full_name}: {reason(error)}") from error
        if count == 0:
            sizes = ", ".join(
                f"{printable(key)} ({split.num_examples:,})" for key, split in info.splits.items()
            )
            raise UserError(
                f"split {self._split!r} of {self._full_name} holds no images; its splits are {sizes}."
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
        found = []
        for i in evenly_spaced(len(self), 64):  # one at a time: they may be large
            (image,) = self.fetch([i])  # also shows that the files can be read
            if height is None or width is None:
                found.append((read_shape(io.BytesIO(image.data), image.where), image.where))
        if found:
            channels = channels or found[0][0][2]
            height, width, _ = common_shape(
                ((*shape[:2], channels), where) for shape, where in found
            )
        if channels == 4 and self.background:
            channels = 3
        if channels not in (1, 3):
            hint = " Set data.background to a colour to put them on it." if channels == 4 else ""
            raise UserError(
                f"the images of {self._full_name} have {channels} channels; expected 1 (gray) or "
                f"3 (colour).{hint}"
            )
        return height, width, channels


def _builder(directory: Path) -> tfds.core.DatasetBuilder:
    incomplete = f"{directory} is not a complete prepared TFDS data set"
    for name in ("dataset_info.json", "features.json"):
        if not (directory / name).is_file():
            raise UserError(f"{incomplete}: it has no {name}. {_ADVICE}")
        try:
            spec = read_json(directory / name)
            classes = list(_class_names(spec if name == "features.json" else _features(spec)))
            shards = 0 if name == "features.json" else _count_shards(spec)
        except UserError as error:
            raise UserError(f"{incomplete}: {error} {_ADVICE}") from error
        if shards > _MAX_SHARDS:
            raise UserError(
                f"{directory / name} lists {shards:,} shards; expected at most {_MAX_SHARDS:,}. Prepare it "
                "again with fewer and larger shards."
            )
        for found in classes:
            if found not in _FEATURES:
                raise UserError(
                    f"{directory / name} names the class {printable(found, 200)}, which is not one of TFDS's "
                    "own features, and would be imported. Use a data set of plain images."
                )
    for path in directory.glob("*.labels.txt"):
        read_file(path, _MAX_NAMES, _ADVICE)  # TFDS reads them whole
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS passes on whatever its parsers of two JSON files raise
        raise UserError(f"{incomplete}: {reason(error)} {_ADVICE}") from error
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        name = printable("/".join(builder.info.full_name.split("/")[:-1]), 200)
        raise UserError(
            f"{directory} holds {printable(builder.info.full_name, 200)} as "
            f"{getattr(file_format, 'value', file_format)}, which has no random access without "
            "TensorFlow; expected array_record. Prepare it again, in another directory:\n"
            f"{_command(name, 'NEW_DATA_DIR')}"
        )
    return builder


def _count_shards(info: Any) -> int:
    """How many splits and shards TFDS would list, in either of its spellings."""
    splits = info.get("splits") if isinstance(info, dict) else None
    count = 0
    for split in splits if isinstance(splits, list) else ():
        count += 1
        for key in ("shardLengths", "shard_lengths") if isinstance(split, dict) else ():
            lengths = split.get(key)
            count += len(lengths) if isinstance(lengths, list) else 0
    return count


def _features(info: Any) -> Any:
    return info.get("features") if isinstance(info, dict) else None


def _class_names(spec: Any) -> Iterator[str]:
    """All that TFDS would take for the name of a feature's class, in either of its notations."""
    if isinstance(spec, list):
        for item in spec:
            yield from _class_names(item)
    if isinstance(spec, dict):
        for key, item in spec.items():
            if key in ("pythonClassName", "python_class_name", "type") and not isinstance(
                item, dict
            ):
                yield str(item)
            elif key == "json" and isinstance(item, str):
                yield from _class_names(parse_json(item, "a feature's JSON"))
            else:
                yield from _class_names(item)


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
            f"{printable(info.full_name, 200)} has {len(images)} image features; expected one. Its features "
            f"are {printable(', '.join(features), 300) or type(info.features).__name__}."
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
    raise NotThereError(
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
