"""Feeds each step's batch to the devices: gathered there where the data set fits, else sent."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_diffusion_jax.training.sharding import batch_sharding, local_rows, put_replicated

DEVICE_BYTES = 2**30  # the largest data set that every device holds whole


class Batches(Protocol):
    """The batches of a run; the one of step k is a pure function of (seed, k).

    This process's rows are those that its devices hold (`sharding.local_rows`), in order.

    Attributes:
        batch_size: images of a step over all processes.
        images: uint8 or float32 [N, H, W, C] when all are held in memory, else None.
        labels: int32 [N], or None.
    """

    batch_size: int
    images: np.ndarray | None
    labels: np.ndarray | None

    def indices(self, step: int) -> np.ndarray:
        """The images of this process's rows of batch `step`, int32 [b]."""
        ...

    def iterate(self, start_step: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields this process's rows of batches start_step, ..., read ahead."""
        ...


@flax.struct.dataclass
class DeviceDataset:
    """A data set on the devices.

    An image is one row: TPUs would change the layout of an array [N, H, W, C] in every step, padded
    to four times its size, which for 70,000 images of 64x64 takes 2 GB and 2 ms.
    """

    rows: dict[str, jax.Array]  # 'image' [N, H * W * C], optional 'label' [N]
    image_shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # H, W, C

    @classmethod
    def of(cls, images: Any, labels: Any) -> "DeviceDataset":
        """From arrays [N, H, W, C] and [N]; labels may be None."""
        rows = {"image": images.reshape(len(images), -1), "label": labels}
        return cls({k: v for k, v in rows.items() if v is not None}, tuple(images.shape[1:]))

    def take(self, index: jax.Array) -> dict[str, jax.Array]:
        """The batch of these images."""
        batch = {k: jnp.take(v, index, axis=0, mode="clip") for k, v in self.rows.items()}
        return batch | {"image": batch["image"].reshape(-1, *self.image_shape)}


class Feed:
    """Hands out one item per step, from which `take` makes the batch inside the compiled step.

    A data set in memory of at most DEVICE_BYTES is copied to every device; a step is then sent only
    the indices of its images. Besides the batch an item holds `signal`, int32 [devices]: the signal
    that each process was told to stop by, or 0.

    Args:
        batches: where batches come from.
        mesh: the devices.
        start: the first step.

    Attributes:
        data: what stays on the devices, or {}.
        waited: seconds that `next` has taken so far.
    """

    def __init__(self, batches: Batches, mesh: Mesh, start: int):
        self.batches, self.mesh, self.step = batches, mesh, start
        self.waited = 0.0
        self.data: DeviceDataset | dict = {}
        self._iterator = None
        self._no_signal = self._put_signal(0)
        if batches.images is not None and batches.images.nbytes <= DEVICE_BYTES:
            self.data = put_replicated(DeviceDataset.of(batches.images, batches.labels), mesh)
        else:
            self._iterator = batches.iterate(start)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()

    def next(self, signal: int | None = None) -> dict[str, jax.Array]:
        """The item of the next step, on its way to the devices."""
        start = time.perf_counter()
        if self._iterator is None:
            rows = {"index": self.batches.indices(self.step)}
        else:
            rows = next(self._iterator)
        item = jax.make_array_from_process_local_data(batch_sharding(self.mesh), dict(rows))
        item["signal"] = self._put_signal(signal) if signal else self._no_signal
        self.step += 1
        self.waited += time.perf_counter() - start
        return item

    def _put_signal(self, signal: int) -> jax.Array:
        here = np.full(local_rows(self.mesh.size, self.mesh).shape, signal, np.int32)
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), here)


def take(data: DeviceDataset | Mapping, item: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch {'image': [B, H, W, C], 'label': [B]} of an item; runs inside the step."""
    if isinstance(data, DeviceDataset):
        return data.take(item["index"])
    return {name: rows for name, rows in item.items() if name != "signal"}
