"""Detectors (networks whose features distances are measured in) and the loop that applies them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import fetch, place

# Images per device in one call, by platform. Fixed, so that an image meets the same compiled
# program whatever batches it arrived in and however many devices there are. Caches make small
# ones faster on a CPU.
DEVICE_BATCH = {"cpu": 16}
DEVICE_BATCH_ELSEWHERE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A network with its weights: uint8 images [B, H, W, C] -> features [B, D] and logits [B, K].

    Attributes:
      name: what the numbers made with it are called, e.g. 'classifier' or 'inception_edm'.
      feature_dim: D.
      network: (variables, uint8 images) -> (float32 features, float32 logits); pure.
      variables: its weights.
      image_shape: the only (H, W, C) it takes, or None where it resizes by itself.
      has_classes: whether the logits are of classes, so that scores of them mean something.
      details: facts that a report may repeat (test accuracy, hash of the weights file).
      recipe: JSON values from which the network can be rebuilt around saved weights; None for
        published networks, whose weights lie in a file of their own.
    """

    name: str
    feature_dim: int
    network: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]]
    variables: PyTree
    image_shape: tuple[int, int, int] | None = None
    has_classes: bool = True
    details: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] | None = None

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the detector's name and its weights.

        The name, since the two Inception detectors differ in their resizing alone.
        """
        return tree_hash({self.name: self.variables})

    @functools.cached_property
    def _compiled(self) -> Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]]:
        # TPU's bfloat16 and Ampere's TF32 products shift a Frechet distance visibly.
        def run(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.default_matmul_precision("highest"):
                return self.network(variables, images)

        return jax.jit(run)

    def outputs(self, images: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Returns (features [B, D], logits [B, K]), float32, of uint8 images [B, H, W, C]."""
        check_images(images, self.image_shape, self.name)
        return self._compiled(self.variables, images)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Returns the features [B, D], float32, of uint8 images [B, H, W, C]."""
        return self.outputs(images)[0]


def cache_folder() -> Path:
    """The folder of downloaded weights and trained networks: $LORA_DIFFUSION_CACHE or ~/.cache."""
    default = os.environ.get("LORA_DIFFUSION_CACHE", "~/.cache/lora_diffusion_jax")
    return Path(default).expanduser()


def tree_hash(tree: PyTree) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a tree's paths, shapes, types, values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def check_images(
    images: jax.Array | np.ndarray, shape: tuple[int, int, int] | None, wanted_by: str
) -> None:
    """Raises UserError unless images are uint8 [B, H, W, C] with 1 or 3 channels (and `shape`)."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"Images have shape {tuple(images.shape)}; expected [batch, height, width, channels] "
            "with 1 (gray) or 3 (colour) channels."
        )
    if images.dtype != np.uint8:
        raise UserError(
            f"Images have type {images.dtype}; expected uint8 (0-255). Features are taken of what "
            "an image file would hold: convert with clip(x * 127.5 + 128, 0, 255)."
        )
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        raise UserError(
            f"Images are {_size(images.shape[1:])}; the {wanted_by} features were made for "
            f"{_size(shape)}. Compare images of that size, or choose other features."
        )


def _size(shape: Iterable[int]) -> str:
    height, width, channels = shape
    return f"{height}x{width}x{channels} (height x width x channels)"


def rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups [n, ...] arrays of any n into arrays of exactly `size` rows; the last may be short.

    The images of all batches must agree in shape; a difference is a UserError.
    """
    held: list[np.ndarray] = []
    count, shape = 0, None
    for batch in batches:
        batch = np.asarray(batch)
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise UserError(
                f"An image has shape {batch.shape[1:]} where the ones before it have {shape}; "
                "all images of one set must have the same size."
            )
        while len(batch):
            part, batch = batch[: size - count], batch[size - count :]
            held.append(part)
            count += len(part)
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if count:
        yield np.concatenate(held)


def extract(
    detector: Detector,
    batches: Iterable[np.ndarray],
    *,
    mesh: Mesh | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (features [n, D], logits [n, K]) of an iterable of uint8 image batches, in order.

    Every image appears once: the last short batch is padded for the device and cut again on the
    host. One batch is always in flight, so reading images and adding up statistics overlap with
    the device's work. Batches are sharded over all axes of `mesh` (default: all devices). Several
    processes must call this alike, each with all images, and each gets all features.
    """
    mesh = mesh or Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    variables = jax.tree.map(lambda v: place(np.asarray(v), whole), detector.variables)
    size = mesh.size * DEVICE_BATCH.get(mesh.devices.flat[0].platform, DEVICE_BATCH_ELSEWHERE)
    flying: tuple[tuple[jax.Array, jax.Array], int] | None = None
    for batch in rebatch(batches, size):
        check_images(batch, detector.image_shape, detector.name)
        count = len(batch)
        batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)])
        started = detector._compiled(variables, place(batch, sharding))
        if flying is not None:
            yield _landed(*flying)
        flying = (started, count)
    if flying is not None:
        yield _landed(*flying)


def _landed(outputs: tuple[jax.Array, jax.Array], count: int) -> tuple[np.ndarray, np.ndarray]:
    features, logits = (fetch(array) for array in outputs)
    return features[:count], logits[:count]
