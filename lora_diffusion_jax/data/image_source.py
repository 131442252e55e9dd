"""What all image sources share: reading by index, labels, a summary, a fingerprint."""

import abc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from lora_diffusion_jax.data.decode import Shape, check_shape, decode, describe_shape
from lora_diffusion_jax.errors import UserError, printable

_FINGERPRINTED = 16  # images whose content enters the fingerprint
_CHUNK = 1024  # images fetched at once where all labels are read


@dataclass(frozen=True)
class EncodedImage:
    """PNG or JPEG bytes, the class, and the image's name in error messages."""

    data: bytes
    label: int
    where: str


class ImageSource(abc.ABC):
    """A random-access set of images of one size (array_types.Source).

    Reading is safe from several threads, and in other processes after pickling or forking.

    Attributes:
        title: what it is and where it lies, for people.
        image_shape: (height, width, channels); channels is 1 or 3 but for arrays.
        dtype: uint8, or float32 for arrays of floats.
        num_classes: 0 when there are no labels.
        class_names: one per class; empty without labels.
        label_origin: where the labels come from, or why there are none, for people.
        bytes_on_disk: size of the encoded images or of the files that hold them.
        left_out: files beside the images that were not read.
    """

    title: str
    image_shape: Shape
    num_classes: int
    class_names: Sequence[str]
    label_origin: str
    bytes_on_disk: int
    left_out: int = 0
    dtype: np.dtype = np.dtype(np.uint8)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns {'image': [n, H, W, C], 'label': int32 [n]} for n indices in [0, len).

        Raises:
            UserError: an image cannot be read or decoded, has another size, or lacks a class.
        """

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """Returns the classes of all images, int32 [N], without decoding an image."""

    @abc.abstractmethod
    def _content(self, index: int) -> bytes:
        """Bytes that are equal for equal images."""

    @abc.abstractmethod
    def _identity(self) -> Sequence[str]:
        """Strings that distinguish this data set from others, wherever it lies."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {'image': [H, W, C], 'label': int32 []}; label is 0 without classes."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        batch = self.read([int(index) % len(self)])
        return {"image": batch["image"][0], "label": batch["label"][0]}

    def empty_classes(self) -> list[int]:
        """The classes without images, where that is known without reading images; else none."""
        return []

    def moments(self) -> tuple[float, float] | None:
        """Mean and standard deviation of what a network sees of an array; None for ordinary images."""
        return None

    def fingerprint(self) -> str:
        """Returns 32 hex digits that identify the content, wherever it lies.

        Cheap: it hashes number, shape and what the data set's index says of every image, and the
        content of 16 evenly spaced images. An edit that keeps names and sizes and misses those 16
        goes unnoticed.
        """
        digest = hashlib.sha256(repr((len(self), self.image_shape, self.num_classes)).encode())
        for text in self._identity():
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        for i in evenly_spaced(len(self), _FINGERPRINTED):  # one at a time: they may be large
            digest.update(hashlib.sha256(self._content(i)).digest())
        return digest.hexdigest()[:32]


class EncodedSource(ImageSource):
    """Images that are stored as PNG or JPEG.

    Attributes:
        background: the colour behind transparent pixels; '' refuses them.
    """

    background: str = ""
    converts: bool = False  # gray images of a colour data set become colour instead of an error

    @abc.abstractmethod
    def fetch(self, indices: Sequence[int]) -> list[EncodedImage]:
        """Reads images without decoding them; a UserError names the one that cannot be read."""

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        for i, encoded in enumerate(self.fetch(indices)):
            images[i] = self._decode(encoded)
            labels[i] = self._checked_label(encoded)
        return {"image": images, "label": labels}

    def labels(self) -> np.ndarray:
        starts = range(0, len(self), _CHUNK)
        labels = [
            self._checked_label(encoded)
            for start in tqdm(starts, desc="reading labels", delay=2, disable=None)
            for encoded in self.fetch(range(start, min(start + _CHUNK, len(self))))
        ]
        return np.array(labels, np.int32)

    def _content(self, index: int) -> bytes:
        (encoded,) = self.fetch([index])
        # a PNG's pixels: other versions of the encoder give other bytes for the same image
        is_png = encoded.data.startswith(b"\x89PNG")
        return self._decode(encoded).tobytes() if is_png else encoded.data

    def _decode(self, encoded: EncodedImage) -> np.ndarray:
        return decode(
            encoded.data,
            encoded.where,
            self.image_shape,
            convert=self.converts,
            background=self.background,
        )

    def _checked_label(self, encoded: EncodedImage) -> int:
        if self.num_classes == 0:
            return 0
        if not 0 <= encoded.label < self.num_classes:
            raise UserError(
                f"{encoded.where} has label {encoded.label}; this data set's classes are 0 to "
                f"{self.num_classes - 1}. A split without labels (often 'test') cannot be used "
                "with classes: choose another split."
            )
        return encoded.label


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most count evenly spaced indices in [0, length), including the first and the last."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).astype(int).tolist()))


def common_shape(shapes: Iterable[tuple[Shape, str]]) -> Shape:
    """The shape of all images, given each one's shape and name; UserError names one that differs."""
    shapes = iter(shapes)
    expected, first = next(shapes)
    for shape, where in shapes:
        check_shape(shape, where, expected, first)
    return expected


def summarize(source: ImageSource, *, max_classes: int = 20) -> str:
    """What a data set holds, one fact per line, for --mode=info.

    All labels are read, and no image except those of the fingerprint.

    Args:
        source: the data set.
        max_classes: how many classes get a line of their own.
    """
    decoded = len(source) * int(np.prod(source.image_shape)) * source.dtype.itemsize
    lines = [
        f"Data set:    {source.title}",
        f"Images:      {len(source):,} of {describe_shape(source.image_shape)}"
        + (", floats" if source.dtype.kind == "f" else ""),
        f"Classes:     {source.num_classes:,} ({source.label_origin})",
        f"On disk:     {_size(source.bytes_on_disk)}; decoded {_size(decoded)}",
        f"Fingerprint: {source.fingerprint()}",
    ]
    if moments := source.moments():
        lines.append(
            "Values:      mean {:.4g}, standard deviation {:.4g} for the network".format(*moments)
        )
    if source.left_out:
        lines.append(f"Left out:    {source.left_out:,} files that are no images, or hidden")
    if not source.num_classes:
        return "\n".join(lines)
    counts = np.bincount(source.labels(), minlength=source.num_classes)
    for i, name in enumerate(source.class_names[:max_classes]):
        label = f"{i}" if name == str(i) else f"{i} {printable(name)}"
        lines.append(f"  class {label}: {counts[i]:,}")
    if len(counts) > max_classes:
        lines.append(
            f"  ... and {len(counts) - max_classes:,} more classes; "
            f"{counts.min():,} to {counts.max():,} images each"
        )
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
