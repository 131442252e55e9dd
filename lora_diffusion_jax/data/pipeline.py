"""Batches as a pure function of (seed, step), from memory or read ahead."""

import functools
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from lora_diffusion_jax import host
from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.interrupts import SIGNALS

# {'image': [B, H, W, C], uint8 or of arrays float32; 'label': int32 [B]}
Batch = dict[str, np.ndarray]

_CHUNK = 256  # images decoded by one thread at a time
READ_AHEAD = 8  # batches kept ready
_MAX_THREADS = 16
# Decoding an image with fewer values than this is mostly Python, which threads only slow down: 32x32
# JPEGs took 134 us with one thread and 160 with two; 256x256 ones 730 and 430 (2 cores).
_THREADED_SIZE = 96 * 96 * 3


class Batches:
    """The training batches of a data set, in an order that depends on the seed alone.

    Position p = k * batch_size + i of the run is image epoch_order(seed, p // N)[p % N]: every
    epoch visits each image once, in a new order, and batches run across the ends of epochs. So a
    run resumes at any step without stored state, with another number of processes, in memory or not.

    A data set whose decoded size is at most memory_limit is decoded once, here, into the attributes
    images and labels; the training loop may put them on the device and gather indices(k) there.
    Larger ones are read and decoded ahead of time, in threads or worker processes.

    Args:
        source: the images.
        batch_size: images per step over all processes, B.
        seed: of the order, in [0, 2**64).
        rows: the positions of each batch that this process holds, ascending, [b]; None: all. With
            several processes each holds the rows of its own devices.
        memory_limit: in bytes.
        num_workers: processes that read ahead instead of this one; 0 for none. Each imports the
            program's main module, since they are spawned.

    Attributes:
        images: [N, H, W, C], uint8 or float32, or None when the data set is streamed.
        labels: int32 [N], or None.
        wait_seconds: total time for which iterate() made its caller wait.

    Raises:
        UserError: sizes that do not fit, or images that cannot be read.
    """

    images: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        rows: Sequence[int] | np.ndarray | None = None,
        memory_limit: int = 2**30,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}; expected at least 1.")
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not len(self._rows) or self._rows[0] < 0 or self._rows[-1] >= batch_size:
            raise ValueError(f"rows {self._rows} of a batch of {batch_size}")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed} of the data order; expected 0 to 2**64 - 1.")
        if not 0 < len(source) < 2**31:
            raise UserError(f"the data set holds {len(source):,} images; expected 1 to 2**31 - 1.")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.wait_seconds = 0.0
        self._num_workers = num_workers
        if len(source) * int(np.prod(source.image_shape)) * _dtype(source).itemsize <= memory_limit:
            self.images, self.labels = _decode_all(source)

    def indices(self, step: int) -> np.ndarray:
        """Returns the images of batch `step` that this process holds, int32 [b] in [0, N)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        size = len(self.source)
        epochs, places = np.divmod(step * self.batch_size + self._rows, size)
        parts = np.split(places, np.flatnonzero(np.diff(epochs)) + 1)  # one per epoch, ascending
        orders = [epoch_order(self.seed, int(epoch), size) for epoch in np.unique(epochs)]
        return np.concatenate([order[part] for order, part in zip(orders, parts, strict=True)])

    def __getitem__(self, step: int) -> Batch:
        """Returns this process's part of batch `step`, read now: image [b, H, W, C], label [b]."""
        indices = self.indices(step)
        if self.images is not None and self.labels is not None:
            return {"image": self.images[indices], "label": self.labels[indices]}
        return _read(self.source, indices)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of start_step, start_step + 1, ... without end, read ahead.

        Closing the iterator, or dropping it, stops the reading; with worker processes close it (or
        leave the function that holds it) before the program ends.
        """
        # From memory a batch is one copy: a single thread stays ahead, and workers would have to
        # be sent the images.
        in_memory = self.images is not None
        options = grain.ReadOptions(
            num_threads=1 if in_memory else _num_threads(self.source),
            prefetch_buffer_size=READ_AHEAD,
        )
        dataset = grain.MapDataset.range(start_step, sys.maxsize).map(self.__getitem__)
        dataset = dataset.to_iter_dataset(options)
        if self._num_workers and not in_memory:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags; a library call has
                flags.FLAGS.mark_as_parsed()  # no command line, so they keep their defaults
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._num_workers),
                worker_init_fn=_ignore_signals,
            )
        iterator = iter(dataset)
        try:
            while True:
                start = time.perf_counter()
                # Workers send arrays in shared memory, which must go before the interpreter does.
                batch = {key: np.array(value) for key, value in next(iterator).items()}
                self.wait_seconds += time.perf_counter() - start
                yield batch
        finally:
            iterator.close()


def _ignore_signals(index: int, count: int) -> None:
    """Ctrl-C and schedulers signal a whole process group, but the parent still needs this worker."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.lru_cache(maxsize=4)  # batches run across the ends of epochs, and are read ahead
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of one epoch: a permutation of [0, size), int32 [size], read-only.

    It sorts the raw 64-bit output of the counter-based generator Philox with key (seed, epoch).
    NumPy guarantees that raw stream, but not its shuffling, across versions. 0.1 s for a million
    images, once per epoch; grain's index shuffle keeps nothing but takes 8 us for every image.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(keys, kind="stable").astype(
        np.int32
    )  # stable: equal keys have one order, too
    order.flags.writeable = False  # the cache hands the same array to all
    return order


def _decode_all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole data set: images [N, H, W, C] and int32 [N]; stops at the first UserError."""
    size = len(source)
    images = np.empty((size, *source.image_shape), _dtype(source))
    labels = np.empty(size, np.int32)

    def fill(start: int) -> int:
        part = slice(start, min(start + _CHUNK, size))
        batch = _read(source, np.arange(part.start, part.stop))
        images[part], labels[part] = batch["image"], batch["label"]
        return part.stop - part.start

    bar = tqdm(
        total=size, desc="decoding images", unit="img", delay=2, mininterval=0.5, disable=None
    )
    with bar, ThreadPoolExecutor(_num_threads(source)) as pool:
        try:
            for count in pool.map(fill, range(0, size, _CHUNK)):
                bar.update(count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images, labels


def _dtype(source: Source) -> np.dtype:
    return source.dtype if isinstance(source, ImageSource) else np.dtype(np.uint8)


def _num_threads(source: Source) -> int:
    """How many threads decode these images fastest."""
    if np.prod(source.image_shape) < _THREADED_SIZE:
        return 1
    return min(_MAX_THREADS, host.usable_cores())


def _read(source: Source, indices: np.ndarray) -> Batch:
    if isinstance(source, ImageSource):
        return source.read(indices.tolist())
    items = [source[int(i)] for i in indices]
    return {
        "image": np.stack([item["image"] for item in items]),
        "label": np.array([item["label"] for item in items], np.int32),
    }
