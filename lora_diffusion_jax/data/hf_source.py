"""Data sets of Hugging Face `datasets`, from the Hub or from Parquet and Arrow files, without TensorFlow."""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files
from lora_diffusion_jax.data.decode import MAX_BYTES, Shape, colour, read_shape
from lora_diffusion_jax.data.image_source import (
    EncodedImage,
    EncodedSource,
    common_shape,
    evenly_spaced,
)
from lora_diffusion_jax.errors import NotThereError, UserError, needs_package, printable
from lora_diffusion_jax.untrusted import normal, reason

PREFIX = "hf"  # of data.name: hf:OWNER/NAME, or hf alone with data.data_dir
_NAME = re.compile(r"hf:(?P<repo>\w[\w.-]*/[\w.-]+)(:(?P<config>[^:@]+))?(@(?P<revision>.+))?")
_READERS = ("parquet", "arrow")  # builders of `datasets` that hold images themselves
_SAVED = ("state.json", "dataset_dict.json")  # of Dataset.save_to_disk and DatasetDict's
_MAX_CLASSES = 100_000
_SHAPES = 1_000  # images whose headers are read on opening
_ROWS = 10_000  # read at once for labels and sizes


def is_hf(name: str) -> bool:
    """Whether data.name means such a data set."""
    return name == PREFIX or name.startswith(f"{PREFIX}:")


class HfSource(EncodedSource):
    """One split of a data set that `datasets` reads; the files lie in its own cache.

    Images are encoded as PNG or JPEG in a column of type Image, or of bytes. Classes are those of a
    ClassLabel column. A column of whole numbers is one too if it is named `label` or asked for, and one
    of text if it is asked for: its classes are its values, sorted. No code of a data set is ever run.

    Args:
        name: 'hf:OWNER/NAME' on the Hub, with ':CONFIG' or '@REVISION' (in this order) appended where it
            has several; or 'hf' for data_dir.
        data_dir: with 'hf': a folder of Parquet or Arrow files, or one that save_to_disk wrote.
        split: a split or a slice of one, such as 'train[:90%]' or 'train+test'.
        image_key: the image's column; '' if there is one.
        label_key: the label's column; '' if there is one or none.
        background: the colour behind transparent pixels; '' refuses them.

    Raises:
        UserError: `datasets` is not installed, there is no such data set or split, its columns are
            ambiguous, or it cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        data_dir: str = "",
        split: str = "train",
        image_key: str = "",
        label_key: str = "",
        background: str = "",
    ) -> None:
        self.background = background
        if background:
            colour(background)
        self._name, splits = _open(name, data_dir)
        data, self._split = _take(self._name, splits, split), split
        self._image_key = _image_column(self._name, data.features, image_key)
        label_key, self.label_origin = _label_column(self._name, data.features, label_key)
        self._data = _undecoded(data, self._image_key, label_key)
        self.class_names, self._labels = self._read_labels(data, label_key)
        self.num_classes = len(self.class_names)
        self.title = f"{self._name}, split {split}"
        self._sizes = self._read_sizes()
        self.bytes_on_disk = int(self._sizes.sum())
        self.image_shape = self._find_shape()

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Sequence[int]) -> list[EncodedImage]:
        try:
            rows = self._data[list(map(int, indices))][self._image_key]
        except Exception as error:  # pyarrow and datasets raise many kinds over damaged files
            raise UserError(
                f"{self.title} cannot be read ({reason(error)}). Its files are damaged or were removed: "
                "download or write them again."
            ) from error
        found = []
        for index, row in zip(indices, rows, strict=True):
            where = f"image {index} of {self.title}"
            data = row.get("bytes") if isinstance(row, Mapping) else row
            if not isinstance(data, bytes):
                raise UserError(
                    f"{where} is not in the data set itself, which holds {type(row).__name__} there; "
                    "expected the bytes of a PNG or JPEG file. Write it again with its images, by "
                    "push_to_hub or to_parquet, or give their folder as data.path."
                )
            if len(data) > MAX_BYTES:
                raise UserError(
                    f"{where} holds {len(data):,} bytes; expected at most {MAX_BYTES:,}. Remove it."
                )
            found.append(EncodedImage(data, int(self._labels[index]), where))
        return found

    def labels(self) -> np.ndarray:
        bad = np.flatnonzero((self._labels < 0) | (self._labels >= max(self.num_classes, 1)))
        if len(bad):  # the usual error, of the first
            self._checked_label(EncodedImage(b"", int(self._labels[bad[0]]), self._where(bad[0])))
        return self._labels

    def empty_classes(self) -> list[int]:
        known = self._labels[self._labels >= 0]
        return np.flatnonzero(np.bincount(known, minlength=self.num_classes) == 0).tolist()

    def _where(self, index: int) -> str:
        return f"image {index} of {self.title}"

    def _identity(self) -> Sequence[str]:
        digest = hashlib.sha256(self._labels.tobytes() + self._sizes.tobytes()).hexdigest()
        identity = (digest, *self.class_names)
        return (*identity, self.background) if self.background else identity

    def _read_labels(self, data: Any, key: str) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of the classes, and the class of each image, int32 [N]; -1 where it has none."""
        import datasets

        if not key:
            return (), np.zeros(len(data), np.int32)
        feature = data.features[key]
        values = [v for part in self._columns(key) for v in part.to_pylist()]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(normal(str(name), self._name) for name in feature.names)
            numbers = [-1 if v is None else v for v in values]
        elif _is_text(feature):
            found = sorted({normal(v, self._name) for v in values if v is not None})
            names, place = tuple(found), {v: i for i, v in enumerate(found)}
            numbers = [-1 if v is None else place[normal(v, self._name)] for v in values]
        else:
            numbers = [-1 if v is None else v for v in values]
            names = tuple(map(str, range(min(max(numbers) + 1, _MAX_CLASSES + 1))))
        if len(names) > _MAX_CLASSES:
            raise UserError(
                f"{self._name}: column {key!r} has more than {_MAX_CLASSES:,} classes, too many for labels. "
                "Give another with data.label_key."
            )
        if min(numbers) < -(2**31) or max(numbers) >= 2**31:
            raise UserError(
                f"{self._name}: column {key!r} holds numbers that are no classes; expected 0, 1, 2, ... "
                "Give another with data.label_key."
            )
        return names, np.array(numbers, np.int32)

    def _read_sizes(self) -> np.ndarray:
        """Bytes of each image, int64 [N]; 0 where there is none."""
        import pyarrow
        import pyarrow.compute

        sizes = []
        for part in self._columns(self._image_key):
            if pyarrow.types.is_struct(part.type):
                part = pyarrow.compute.struct_field(part, "bytes")
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(part), 0)
            sizes.append(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(sizes)

    def _columns(self, key: str) -> Iterator[Any]:
        """A column's values in parts, as arrays of Arrow."""
        import pyarrow

        data = self._data.with_format("arrow")
        for start in range(0, len(data), _ROWS):
            column = data[start : start + _ROWS].column(key)
            for chunk in column.chunks:
                extension = isinstance(chunk, pyarrow.ExtensionArray)
                yield chunk.storage if extension else chunk

    def _find_shape(self) -> Shape:
        def shapes() -> Iterator[tuple[Shape, str]]:
            for i in evenly_spaced(len(self), _SHAPES):  # one at a time: they may be large
                (image,) = self.fetch([i])
                yield read_shape(io.BytesIO(image.data), image.where), image.where

        return common_shape(shapes())


def repo_of(name: str) -> str:
    """OWNER/NAME of hf:OWNER/NAME[:CONFIG][@REVISION]; '' for any other name."""
    match = _NAME.fullmatch(name)
    return match["repo"] if match else ""


def _open(name: str, data_dir: str) -> tuple[str, Mapping[str, Any]]:
    """The data set's name in messages, and its splits."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        wanted = needs_package(f"data.name={name}", error.name, "train,eval,hf-datasets")
        raise UserError(wanted) from error
    if name == PREFIX:
        folder = Path(files.expand(data_dir, "data.data_dir"))
        _check_folder(data_dir, folder)
        if any((folder / file).is_file() for file in _SAVED):
            return str(folder), _opened(str(folder), lambda: _saved(folder))
        # Absolute: relative names like "parquet" or "csv" are formats to `datasets`.
        shown, path, chosen = str(folder), str(folder.absolute()), {}
    else:
        match = _NAME.fullmatch(name)
        if not match or data_dir:
            found = f"data.name={name} with data.data_dir={data_dir}" if data_dir else name
            raise UserError(
                f"{printable(found, 200)} names no data set; give data.name=hf:OWNER/NAME for one on the "
                "Hugging Face Hub (with :CONFIG or @REVISION behind it where it has several), or "
                "data.name=hf with data.data_dir=FOLDER for files of your own."
            )
        if Path(match["repo"]).exists():  # which `datasets` would read instead
            raise UserError(
                f"{name}: there is also a folder {match['repo']} here; give data.name=hf with "
                "data.data_dir=FOLDER for that one, or start the command elsewhere."
            )
        shown, path = name, match["repo"]
        chosen = {"name": match["config"], "revision": match["revision"]}

    def read() -> Mapping[str, Any]:
        builder = datasets.load_dataset_builder(path, **chosen)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _READERS:
            raise UserError(
                f"{shown} is a data set of the kind {kind!r}; expected one whose images lie in Parquet or "
                "Arrow files. The Hub converts others, as revision refs/convert/parquet "
                "(@refs/convert/parquet); folders of images are read by data.path."
            )
        builder.download_and_prepare()
        return builder.as_dataset()

    return shown, _opened(shown, read)


def _check_folder(data_dir: str, folder: Path) -> None:
    if not data_dir:
        raise UserError(
            "data.name=hf needs data.data_dir, a folder of Parquet or Arrow files; for a data set on the "
            "Hugging Face Hub give data.name=hf:OWNER/NAME."
        )
    if not folder.is_dir():
        raise NotThereError(
            f"data.data_dir={data_dir} is not a folder; give one with Parquet or Arrow files."
        )


def _saved(folder: Path) -> Mapping[str, Any]:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    return found


def _opened(shown: str, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `read` returns, and whatever it raises as one sentence."""
    import datasets

    try:
        return read()
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise NotThereError(
            f"There is no data set {shown}, or it is not public, or its files are of no known kind "
            f"({reason(error)}). Check its name; `hf auth login` gives access to gated ones."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise NotThereError(
            f"{shown} cannot be reached ({reason(error)}). Check the network, or use a data set that was "
            "downloaded before with HF_DATASETS_OFFLINE=1."
        ) from error
    except Exception as error:  # of many libraries
        raise UserError(
            f"{shown} cannot be opened as a data set ({reason(error)}). Check its name and files; in the "
            f"cache of {os.environ.get('HF_HOME', '~/.cache/huggingface')}, remove what is damaged."
        ) from error


def _take(name: str, splits: Mapping[str, Any], split: str) -> Any:
    """The rows of a split or of slices."""
    import datasets

    sizes = {key: len(data) for key, data in splits.items()}
    try:
        instructions = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except Exception as error:
        listed = ", ".join(f"{printable(key)} ({size:,})" for key, size in sizes.items())
        raise UserError(
            f"{name} has no split {printable(split)!r}: its splits are {listed}, and slices are such as "
            f"'train[:90%]' ({reason(error)}). Set data.split, or data.eval_split."
        ) from error
    parts = [
        splits[each.splitname].select(
            range(each.from_ or 0, each.to if each.to is not None else sizes[each.splitname])
        )
        for each in instructions
    ]
    data = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if not len(data):
        raise UserError(f"split {split!r} of {name} holds no images; choose another data.split.")
    return data


def _image_column(name: str, features: Mapping[str, Any], asked: str) -> str:
    """The name of the image's column."""
    import datasets

    images = [key for key, f in features.items() if isinstance(f, datasets.Image)]
    encoded = [key for key, f in features.items() if _is_encoded(f)]
    candidates = images or encoded
    if asked:
        if asked not in (*images, *encoded):
            raise UserError(
                f"data.image_key={asked!r} is no column of images of {name}; those are "
                f"{_listed(images + encoded)}, and all its columns {_listed(features)}."
            )
        return asked
    if len(candidates) != 1:
        raise UserError(
            f"{name} has {len(candidates)} columns of images ({_listed(candidates)}); expected one. "
            f"Choose with data.image_key; its columns are {_listed(features)}."
        )
    return candidates[0]


def _label_column(name: str, features: Mapping[str, Any], asked: str) -> tuple[str, str]:
    """The name of the label's column, '' for none; and where labels come from, or why there are none."""
    import datasets

    classes = [key for key, f in features.items() if isinstance(f, datasets.ClassLabel)]
    numbers = [key for key, f in features.items() if _is_number(f)]
    texts = [key for key, f in features.items() if _is_text(f)]
    if asked:
        if asked not in (*classes, *numbers, *texts):
            raise UserError(
                f"data.label_key={asked!r} is no column of labels of {name}; expected one of "
                f"{_listed(classes + numbers + texts)}."
            )
        return asked, f"column {asked!r}"
    if len(classes) == 1 or "label" in classes:
        chosen = classes[0] if len(classes) == 1 else "label"
        return chosen, f"column {chosen!r}"
    if classes:
        return "", f"several columns are labels, {_listed(classes)}: choose with data.label_key"
    if "label" in numbers:
        return "label", "column 'label'"
    others = (
        f"; data.label_key can name one of {_listed(numbers + texts)}" if numbers or texts else ""
    )
    return "", f"no column is a class label{others}"


def _undecoded(data: Any, image_key: str, label_key: str) -> Any:
    """The two columns, with images as they are encoded: one decoder serves all sources."""
    import datasets

    data = data.select_columns([image_key, *([label_key] if label_key else [])])
    if isinstance(data.features[image_key], datasets.Image):
        data = data.cast_column(image_key, datasets.Image(decode=False))
    return data


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else ""


def _is_number(feature: Any) -> bool:
    return re.fullmatch("u?int(8|16|32|64)", _dtype(feature)) is not None


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds bytes, alone or as {'bytes': ..., 'path': ...}."""
    if isinstance(feature, Mapping):
        feature = feature.get("bytes")
    return _dtype(feature) in ("binary", "large_binary")


def _listed(names: Any) -> str:
    return ", ".join(printable(name) for name in names) or "none"
