"""Arrays of NumPy as a data set: images, latents, or fields of any number of channels."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.data.decode import Shape
from lora_diffusion_jax.data.image_source import ImageSource, evenly_spaced
from lora_diffusion_jax.errors import NotThereError, UserError, printable
from lora_diffusion_jax.files import expand
from lora_diffusion_jax.npz import read_npz
from lora_diffusion_jax.untrusted import refusing

SUFFIXES = (".npy", ".npz")
LAYOUTS = ("NHWC", "NCHW")
_IMAGES = ("images", "samples", "arr_0")  # names in an npz, the first that there is
_LABELS = "labels"
_EXPECTED = "an array [N, height, width, channels] of floats or uint8"
_CHECKED = 64  # examples looked at on opening; all are when they are read
_MAX_CLASSES = 100_000


def is_array(path: str) -> bool:
    """Whether data.path means such a file."""
    return Path(path).suffix.lower() in SUFFIXES


class NumpySource(ImageSource):
    """A .npy file, which is mapped into memory, or a .npz file, which is read into it.

    Floats are used as they are, or as (value - mean) / std; uint8 as images, [0, 255] is [-1, 1]. Classes
    are whole numbers [N]: the array `labels` of a .npz, or beside X.npy the file X.labels.npy.

    Args:
        path: the file.
        layout: NHWC or NCHW, the order of its axes.
        mean: of floats: subtracted from them; () for 0, one number or one per channel.
        std: of floats: what is then divided by; () for 1, one number or one per channel.
        image_key: the array's name in a .npz; '' is `images`, `samples` or `arr_0`.
        label_key: the name of the labels in a .npz; '' is `labels`.

    Raises:
        UserError: no such file or array, or one of another type or shape, or with NaN or infinity.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: str = "NHWC",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        image_key: str = "",
        label_key: str = "",
    ) -> None:
        self._path = Path(expand(path, "data.path"))
        self._layout, self._keys = layout, (image_key, label_key)
        if layout not in LAYOUTS:
            raise UserError(f"data.layout is {printable(layout)}; it must be one of {LAYOUTS}.")
        if not self._path.is_file():
            raise NotThereError(f"There is no file {self._path}; expected {_EXPECTED}.")
        self._array, labels, self.label_origin = self._open()
        _check_kind(self._array, str(self._path), layout)
        self.dtype = np.dtype(np.uint8 if self._array.dtype == np.uint8 else np.float32)
        self.image_shape: Shape = tuple(self._nhwc(self._array[:0]).shape[1:])
        self._mean = _per_channel("mean", mean, self.image_shape[2], 0.0)
        self._std = _per_channel("std", std, self.image_shape[2], 1.0)
        self._scaled = bool(len(mean) or len(std))
        if self._scaled and self.dtype == np.uint8:
            raise UserError(
                f"data.mean and data.std are for floats, but {self._path} holds uint8, which is used as "
                "[0, 255] -> [-1, 1]; leave them out, or convert the array."
            )
        self._labels = _check_labels(labels, len(self._array), self.label_origin)
        self.num_classes = 0 if labels is None else int(self._labels.max()) + 1
        self.class_names = tuple(map(str, range(self.num_classes)))
        self.title = f"the array {self._path}"
        self.bytes_on_disk = self._path.stat().st_size
        self.read(evenly_spaced(len(self), _CHECKED))

    def __len__(self) -> int:
        return len(self._array)

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        with refusing(str(self._path), advice="Write it again."):
            stored = self._nhwc(self._array[list(map(int, indices))])
        if self.dtype == np.uint8:
            return {"image": np.ascontiguousarray(stored), "label": self._labels[indices]}
        with np.errstate(over="ignore", invalid="ignore"):  # the check below speaks of it
            images = (stored.astype(np.float32) - self._mean) / self._std
        good = np.isfinite(images).all(axis=(1, 2, 3))
        if not good.all():
            bad = indices[int(np.argmin(good))]
            raise UserError(
                f"Example {bad} of {self._path} holds NaN or infinity, or numbers too large for float32; "
                "remove it or mend the array."
            )
        return {"image": images, "label": self._labels[indices]}

    def labels(self) -> np.ndarray:
        return self._labels

    def empty_classes(self) -> list[int]:
        counts = np.bincount(self._labels, minlength=self.num_classes)
        return np.flatnonzero(counts[: self.num_classes] == 0).tolist()

    def moments(self, count: int = 1_000) -> tuple[float, float]:
        values = np.concatenate(
            [self.read([i])["image"].ravel()[:65_536] for i in evenly_spaced(len(self), count)],
            dtype=np.float64,
        )
        if self.dtype == np.uint8:
            values = values / 127.5 - 1
        return float(values.mean()), float(values.std())

    def _content(self, index: int) -> bytes:
        return np.ascontiguousarray(self._array[index]).tobytes()

    def _identity(self) -> Sequence[str]:
        digest = hashlib.sha256(self._labels.tobytes()).hexdigest()
        scale = [*self._mean.tolist(), *self._std.tolist()] if self._scaled else []
        return (digest, self._array.dtype.str, self._layout, *map(str, scale))

    def _nhwc(self, array: np.ndarray) -> np.ndarray:
        return array if self._layout == "NHWC" else array.transpose(0, 2, 3, 1)

    def _open(self) -> tuple[np.ndarray, np.ndarray | None, str]:
        """The array, the labels or None, and where they come from."""
        image_key, label_key = self._keys
        if self._path.suffix.lower() == ".npy":
            if image_key or label_key:
                raise UserError(
                    f"data.{'image' if image_key else 'label'}_key names an array of a .npz file, and "
                    f"{self._path} is a single one; leave it out."
                )
            beside = self._path.with_name(f"{self._path.stem}.labels.npy")
            if not beside.is_file():
                return _mapped(self._path), None, f"there is no {beside.name} beside it"
            return _mapped(self._path), np.array(_mapped(beside)), str(beside)
        names, _ = read_npz(self._path, lambda name: False, _EXPECTED)
        wanted = [image_key] if image_key else [name for name in _IMAGES if name in names]
        labels = label_key or (_LABELS if _LABELS in names else "")
        for name in (*(wanted[:1] or [_IMAGES[0]]), *([labels] if labels else [])):
            if name not in names:
                raise UserError(
                    f"{self._path} has no array {printable(name)!r}, only "
                    f"{printable(', '.join(names), 300) or 'none'}; name {_EXPECTED} with data.image_key, "
                    "labels with data.label_key."
                )
        _, arrays = read_npz(self._path, lambda name: name in (wanted[0], labels), _EXPECTED)
        origin = f"array {labels!r}" if labels else "there is no array 'labels'"
        found = arrays.get(labels)
        if found is not None and not label_key and np.all(found == -1):  # unconditional samples
            found, origin = None, "the labels are all -1"
        return arrays[wanted[0]], found, origin

    def __getstate__(self) -> dict[str, Any]:
        if self._path.suffix.lower() == ".npz":
            return self.__dict__
        return {key: value for key, value in self.__dict__.items() if key != "_array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_array" not in state:
            self._array = _mapped(self._path)  # sending it would copy the whole file


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, read where it is used."""
    with refusing(str(path), "read as an array", f"Expected {_EXPECTED}: write it again."):
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in read:
                raise ValueError(f"npy version {version}")
            if read[version](file)[2].hasobject:
                raise UserError(
                    f"{path} holds Python objects, which are never read; expected {_EXPECTED}."
                )
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_kind(array: np.ndarray, where: str, layout: str) -> None:
    """Raises UserError unless an array has floats or uint8, and four axes that make sense."""
    if array.dtype != np.uint8 and (array.dtype.kind != "f" or array.dtype.itemsize > 8):
        advice = {
            "i": "convert to uint8, if it is of [0, 255], or to float32",
            "u": "convert to uint8, if it is of [0, 255], or to float32",
            "b": "convert it to float32",
            "c": "give real and imaginary parts as channels",
        }.get(array.dtype.kind, "convert it to float32")
        raise UserError(
            f"{where} holds {array.dtype} of the shape {array.shape}; expected {_EXPECTED}: {advice}."
        )
    axes = "[N, height, width, channels]" if layout == "NHWC" else "[N, channels, height, width]"
    if array.ndim != 4 or min(array.shape) == 0:
        advice = "add an axis for the channel" if array.ndim == 3 else "reshape it"
        raise UserError(
            f"{where} has the shape {array.shape}; expected {axes}, none of them 0: {advice}."
        )
    first, second, third = array.shape[1:]
    # [N, 4, 32, 32] or [N, 32, 32, 4] under the other's name
    other = first < second == third if layout == "NHWC" else first == second > third
    if other:
        right = "NCHW" if layout == "NHWC" else "NHWC"
        raise UserError(
            f"{where} has the shape {array.shape}, which would not be square as {axes}: set "
            f"data.layout={right}, or transpose it if it really is {layout}."
        )


def _per_channel(name: str, values: Sequence[float], channels: int, usual: float) -> np.ndarray:
    """One number, or one per channel, as float32 [1] or [C]."""
    found = np.asarray(values or (usual,), np.float32)
    positive = name == "mean" or bool((found > 0).all())
    if found.shape not in ((1,), (channels,)) or not (np.isfinite(found).all() and positive):
        raise UserError(
            f"data.{name}={printable(list(values), 200)}; expected one finite "
            f"{'' if name == 'mean' else 'positive '}number, or one for each of {channels} channels."
        )
    return found


def _check_labels(labels: np.ndarray | None, count: int, where: str) -> np.ndarray:
    """Labels as int32 [N]; zeros for none."""
    if labels is None:
        return np.zeros(count, np.int32)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"The labels ({where}) are {labels.dtype} of the shape {labels.shape}; expected whole numbers, "
            f"one for each of {count:,} examples."
        )
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise UserError(
            f"The labels ({where}) run from {labels.min()} to {labels.max()}; expected classes from 0 on, "
            f"below {_MAX_CLASSES:,}."
        )
    return labels.astype(np.int32)
