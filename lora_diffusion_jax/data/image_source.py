"""What every image source shares: reading by index, labels, description, fingerprint."""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lora_diffusion_jax.data.decode import decode, describe_shape
from lora_diffusion_jax.errors import UserError

_SAMPLED = 16  # records whose bytes enter the fingerprint
_CHUNK = 1024  # records fetched at once where all of them are walked


@dataclass(frozen=True)
class Record:
    """One encoded image: PNG or JPEG bytes, its class, and its name for error messages."""

    data: bytes
    label: int
    where: str


class ImageSource(abc.ABC):
    """A random-access set of images of one size, stored encoded (array_types.Source).

    Reading is safe from several threads, and after pickling or forking to other processes.

    Attributes:
        title: what it is and where it lies, for people.
        image_shape: (height, width, channels); channels is 1 or 3.
        num_classes: 0 when there are no labels.
        class_names: one per class; empty without labels.
        label_origin: where the labels come from, or why there are none, for people.
        bytes_on_disk: size of the encoded images or of the files that hold them.
    """

    title: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: Sequence[str]
    label_origin: str
    bytes_on_disk: int
    converts: bool = False  # gray images of a colour data set become colour instead of an error

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def records(self, indices: Sequence[int]) -> list[Record]:
        """Fetches encoded images without decoding them; UserError names what cannot be read."""

    @abc.abstractmethod
    def _identity(self) -> Sequence[str]:
        """Strings that tell this data set from others, free of the place where it lies."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns {'image': uint8 [H, W, C], 'label': int32 []}; label is 0 without classes."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        batch = self.read([int(index) % len(self)])
        return {"image": batch["image"][0], "label": batch["label"][0]}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns {'image': uint8 [n, H, W, C], 'label': int32 [n]} for n indices in [0, len).

        Raises:
            UserError: a record cannot be read or decoded, has another size, or lacks a class.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        for i, record in enumerate(self.records(indices)):
            images[i] = decode(record.data, record.where, self.image_shape, convert=self.converts)
            labels[i] = self._checked_label(record)
        return {"image": images, "label": labels}

    def labels(self) -> np.ndarray:
        """Returns the classes of all images, int32 [N], without decoding an image."""
        parts = []
        with tqdm(total=len(self), desc="reading labels", unit="img", delay=2) as bar:
            for start in range(0, len(self), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(self)))
                parts.append([self._checked_label(r) for r in self.records(indices)])
                bar.update(len(indices))
        return np.concatenate(parts).astype(np.int32)

    def fingerprint(self) -> str:
        """Returns 32 hex digits that identify the content, whatever the place it lies at.

        Cheap: number, shape and what the index of the data set says of every record are hashed,
        and 16 evenly spaced images (a PNG's pixels, a JPEG's bytes). An edit that keeps names and
        sizes and misses those 16 goes unnoticed.
        """
        digest = hashlib.sha256(repr((len(self), self.image_shape, self.num_classes)).encode())
        for text in self._identity():
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        for record in self.records(spaced(len(self), _SAMPLED)):
            data = record.data
            if data.startswith(b"\x89PNG"):  # the pixels: encoders of other versions pack otherwise
                data = decode(data, record.where, self.image_shape, convert=self.converts).tobytes()
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()[:32]

    def _checked_label(self, record: Record) -> int:
        if self.num_classes == 0:
            return 0
        if not 0 <= record.label < self.num_classes:
            raise UserError(
                f"{record.where} has label {record.label}; this data set's classes are "
                f"0 to {self.num_classes - 1}. A split without labels (often 'test') "
                "cannot be used with classes: choose another split."
            )
        return record.label


def spaced(length: int, count: int) -> list[int]:
    """At most count evenly spaced indices in [0, length), first and last among them."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).astype(int).tolist()))


def describe(source: ImageSource) -> dict[str, Any]:
    """Says what a data set holds, as plain values; labels are all read, images are not.

    Returns:
        A dict with title, images, height, width, channels, classes, class_names and class_counts
        (lists in order of the ids, empty without labels), label_origin, bytes_on_disk,
        bytes_decoded, fingerprint.
    """
    height, width, channels = source.image_shape
    counts = []
    if source.num_classes:
        counts = np.bincount(source.labels(), minlength=source.num_classes).tolist()
    return {
        "title": source.title,
        "images": len(source),
        "height": height,
        "width": width,
        "channels": channels,
        "classes": source.num_classes,
        "class_names": list(source.class_names),
        "class_counts": counts,
        "label_origin": source.label_origin,
        "bytes_on_disk": source.bytes_on_disk,
        "bytes_decoded": len(source) * height * width * channels,
        "fingerprint": source.fingerprint(),
    }


def format_description(description: dict[str, Any], *, max_classes: int = 20) -> str:
    """Lays out what describe() returns as text, one line a fact, for --mode=info."""
    shape = tuple(description[key] for key in ("height", "width", "channels"))
    lines = [
        f"Data set:    {description['title']}",
        f"Images:      {description['images']:,} of {describe_shape(shape)}",
        f"Classes:     {description['classes']:,} ({description['label_origin']})",
        f"On disk:     {_size(description['bytes_on_disk'])}; "
        f"decoded {_size(description['bytes_decoded'])}",
        f"Fingerprint: {description['fingerprint']}",
    ]
    counts = description["class_counts"]
    names = description["class_names"]
    for i, (name, count) in enumerate(zip(names[:max_classes], counts, strict=False)):
        label = f"{i}" if name == str(i) else f"{i} {name}"
        lines.append(f"  class {label}: {count:,}")
    if len(counts) > max_classes:
        lines.append(
            f"  ... and {len(counts) - max_classes:,} more classes; "
            f"{min(counts):,} to {max(counts):,} images each"
        )
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
