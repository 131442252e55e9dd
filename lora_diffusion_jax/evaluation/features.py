"""Detectors (networks whose features distances are measured in) and the loop that applies them."""

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_diffusion_jax import files
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import call, fetch, place

# Images per device and call, by platform. Fixed, so that every image runs through the same compiled
# program whatever batches it arrives in and however many devices there are. Small batches stay in
# a CPU's caches.
DEVICE_BATCH = {"cpu": 16}
DEVICE_BATCH_ELSEWHERE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A network with its weights: uint8 images [B, H, W, C] -> features [B, D] and logits [B, K].

    Attributes:
        name: names the feature space in results, e.g. 'classifier' or 'inception_edm'.
        feature_dim: D.
        network: (variables, uint8 images) -> (float32 features, float32 logits); pure.
        variables: its weights.
        image_shape: the only (H, W, C) it accepts, or None if it resizes.
        has_classes: whether the logits are those of classes, as the Inception Score needs.
        details: facts for reports (number of training images, hash of the weights file).
        recipe: JSON values from which the network can be rebuilt around saved weights; None for
            published networks, whose weights have a file of their own.
    """

    name: str
    feature_dim: int
    network: Callable[[PyTree, jax.Array], Any]
    variables: PyTree
    image_shape: tuple[int, int, int] | None = None
    has_classes: bool = True
    details: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] | None = None

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the detector's name and weights.

        The name counts because the two Inception detectors differ only in how they resize.
        """
        return tree_hash({self.name: self.variables})

    @property
    def is_inception(self) -> bool:
        """Whether distances in these features may be called FID and KID."""
        return self.name.startswith("inception_")

    @property
    def labels(self) -> dict[str, Any]:
        """What results say of their features."""
        labels: dict[str, Any] = {"features": self.name, "detector_hash": self.hash}
        if self.is_inception:
            labels["detector_verified"] = bool(self.details["verified"])
        return labels

    @functools.cached_property
    def compiled(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The network under jit."""

        # bfloat16 products on TPUs and TF32 ones on Ampere GPUs visibly shift a Frechet distance.
        def run(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.default_matmul_precision("highest"):
                return self.network(variables, images)

        return jax.jit(run)

    def outputs(self, images: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Returns (features [B, D], logits [B, K]), float32, of uint8 images [B, H, W, C]."""
        check_images(images, self.image_shape, self.name)
        return self.compiled(self.variables, images)

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Returns the features [B, D], float32, of uint8 images [B, H, W, C]."""
        return self.outputs(images)[0]


def cache_folder() -> Path:
    """The folder of downloaded and trained networks: $LORA_DIFFUSION_CACHE, or one in ~/.cache."""
    default = os.environ.get("LORA_DIFFUSION_CACHE", "~/.cache/lora_diffusion_jax")
    return Path(files.expand(default, "LORA_DIFFUSION_CACHE"))


def check_cache() -> None:
    """Raises UserError unless the cache folder can be written: now, rather than after the work."""
    folder = cache_folder()
    with files.disk_errors(folder, "Set LORA_DIFFUSION_CACHE to a folder that can be written."):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(tree: PyTree) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a tree's paths, shapes, types and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def shape_differences(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """Says how the tensors of a weights file differ from those of a network; '' if they do not."""
    wrong = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not wrong:
        return ""
    name, more = wrong[0], f" ({len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
    expected = wanted.get(name, "no such tensor")
    return f"{name} is {found.get(name, 'missing')}, expected {expected}{more}"


def check_images(
    images: jax.Array | np.ndarray, shape: tuple[int, int, int] | None, name: str
) -> None:
    """Raises UserError unless images are uint8 [B, H, W, C] with 1 or 3 channels (and of `shape`)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"Images are {images.dtype} {tuple(images.shape)}; expected uint8 [batch, height, width, "
            "channels] with 1 (gray) or 3 (colour) channels. Convert images in [-1, 1] with "
            "clip(x * 127.5 + 128, 0, 255)."
        )
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        found, wanted = ("x".join(map(str, size)) for size in (images.shape[1:], shape))
        raise UserError(
            f"Images are {found} (height x width x channels); the {name} features were made for "
            f"{wanted}. Compare images of that size, or choose other features."
        )


def rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups [n, ...] arrays of any n into arrays of exactly `size` rows; the last may be short."""
    rest: list[np.ndarray] = []
    for batch in batches:
        whole = np.concatenate([*rest, batch])
        ends = range(size, len(whole) + 1, size)
        yield from (whole[end - size : end] for end in ends)
        rest = [whole[len(ends) * size :]]
    if rest and len(rest[0]):
        yield rest[0]


def extract(
    detector: Detector, batches: Iterable[np.ndarray], *, mesh: Mesh | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (features [n, D], logits [n, K]) of an iterable of uint8 image batches, in order.

    Every image appears once: the last short batch is padded for the devices and cut again on the
    host. Batches are sharded over all axes of `mesh` (default: all devices). With several processes
    all must call this alike, each with all images; each gets all features.
    """
    mesh = mesh or Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    variables = jax.tree.map(lambda v: place(np.asarray(v), whole), detector.variables)
    size = mesh.size * DEVICE_BATCH.get(mesh.devices.flat[0].platform, DEVICE_BATCH_ELSEWHERE)
    # One batch is always in flight: reading images and adding up statistics overlap with the devices.
    in_flight: tuple[tuple[jax.Array, jax.Array], int] | None = None
    for batch in rebatch(batches, size):
        check_images(batch, detector.image_shape, detector.name)
        count = len(batch)
        batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)])
        started = call(detector.compiled, variables, place(batch, sharding))
        if in_flight is not None:
            yield _fetch(*in_flight)
        in_flight = (started, count)
    if in_flight is not None:
        yield _fetch(*in_flight)


def _fetch(outputs: tuple[jax.Array, jax.Array], count: int) -> tuple[np.ndarray, np.ndarray]:
    features, logits = (fetch(array) for array in outputs)
    return features[:count], logits[:count]
