"""From image batches to what metrics need: moments always, rows where asked; resumable on disk."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, extract
from lora_diffusion_jax.evaluation.npz import read_npz, write_npz
from lora_diffusion_jax.evaluation.statistics import Moments
from lora_diffusion_jax.processes import alone, from_leader, is_leader
from lora_diffusion_jax.processes.interrupts import pause_point

SAVE_SECONDS = 30.0  # between saves of partial sums


@dataclasses.dataclass
class FeatureSet:
    """What is known of one set of images in one feature space."""

    moments: Moments
    features: np.ndarray | None = None  # float32 [n, D], where they were kept
    logits: np.ndarray | None = None  # float32 [n, K]

    def __len__(self) -> int:
        return len(self.moments)


def collect(
    detector: Detector,
    batches: Iterable[np.ndarray],
    *,
    keep_rows: bool = False,
    total: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> FeatureSet:
    """Returns moments (and rows) of the detector's features over uint8 batches [n, H, W, C].

    Raises:
      UserError: no images, or not exactly `total` where that is given.
    """
    store = _Memory(keep_rows)
    return _gather(detector, lambda done: batches, total, store, mesh, progress)


def _gather(
    detector: Detector,
    batches_from: Callable[[int], Iterable[np.ndarray]],
    total: int | None,
    store: "_Memory | _Partial | _Shared",
    mesh: Mesh | None,
    progress: bool,
) -> FeatureSet:
    """Adds up the features of the images that the store does not have yet."""
    moments = store.restore(detector.feature_dim)
    bar = tqdm(
        total=total,
        initial=len(moments),
        desc=f"{detector.name} features",
        unit="img",
        disable=None if progress else True,
    )
    batches = () if len(moments) == total else batches_from(len(moments))
    saved_at = time.monotonic()
    try:
        with bar:
            for features, logits in extract(detector, batches, mesh=mesh):
                pause_point()
                store.append(features, logits)  # first: rows without sums are cut off again
                moments.add(features)
                bar.update(len(features))
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    store.save(moments)
                    saved_at = time.monotonic()
    except BaseException:  # a signal too: what is done is kept
        if len(moments):
            store.save(moments)
        raise
    _check_count(len(moments), total)
    store.save(moments)
    return FeatureSet(moments, *store.rows(len(moments)))


def _check_count(found: int, wanted: int | None) -> None:
    if found == 0:
        raise UserError("There are no images to evaluate.")
    if wanted is not None and found != wanted:
        raise UserError(f"{wanted} images were asked for, but there are {found}.")


def collect_resumable(
    detector: Detector,
    batches_from: Callable[[int], Iterable[np.ndarray]],
    total: int,
    folder: Path,
    *,
    identity: dict[str, object],
    keep_rows: bool = False,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> FeatureSet:
    """Like `collect`, but a killed run goes on where it last saved, to the same result bit for bit.

    Args:
      detector: the feature space.
      batches_from: k -> the images from number k on; image k must not depend on what came before.
      total: number of images.
      folder: holds the partial sums while they grow; removed by `forget` when they are not needed.
      identity: what the sums are of; a folder with another identity is started anew.
      keep_rows: keep features and logits of every image.
      mesh: devices; all by default.
      progress: show a bar.

    Several processes must call this alike; the result of process 0 alone is whole.
    """
    with contextlib.ExitStack() as stack:
        from_leader("locking the partial sums", lambda: stack.enter_context(_locked(folder)))
        store = _Partial(folder, {**identity, "detector": detector.hash, "rows": keep_rows})
        if not alone():
            store = _Shared(store if is_leader() else None)
        return _gather(detector, batches_from, total, store, mesh, progress and is_leader())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of partial sums; it dies with the process."""
    path = _lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {path.parent} for partial results: {error.strerror}. Choose "
            "another with the environment variable LORA_DIFFUSION_CACHE, or make it writable."
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another process is computing the same result in {folder}; wait for it or stop it."
            ) from error
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def forget(folder: Path) -> None:
    """Removes the partial sums of a finished evaluation."""
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)


class _Memory:
    """Rows in memory, nothing on disk."""

    def __init__(self, keep_rows: bool):
        self.keep_rows = keep_rows
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def restore(self, dim: int) -> Moments:
        return Moments(dim)

    def append(self, features: np.ndarray, logits: np.ndarray) -> None:
        if self.keep_rows:
            self.parts.append((features, logits))

    def save(self, moments: Moments) -> None:
        pass

    def rows(self, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.keep_rows:
            return None, None
        return tuple(np.concatenate(parts) for parts in zip(*self.parts, strict=True))


class _Shared:
    """Sums on the disk of process 0; the others take part in extraction, and only count."""

    def __init__(self, store: "_Partial | None"):
        self.store = store

    def restore(self, dim: int) -> Moments:
        found: list[Moments] = []

        def read() -> int:
            found.append(self.store.restore(dim))
            return len(found[0])

        count = from_leader("reading the partial sums", read)
        moments = Moments(dim)
        moments.sums = moments.sums._replace(count=count)  # counted, not summed
        return found[0] if found else moments

    def append(self, features: np.ndarray, logits: np.ndarray) -> None:
        if self.store is not None:
            self.store.append(features, logits)

    def save(self, moments: Moments) -> None:
        if self.store is not None:
            self.store.save(moments)

    def rows(self, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        return (None, None) if self.store is None else self.store.rows(count)


class _Partial:
    """Sums on disk: state.npz, replaced whole, and rows appended to two plain float32 files."""

    def __init__(self, folder: Path, identity: dict[str, object]):
        self.folder, self.identity = folder, json.dumps(identity, sort_keys=True)
        self.state = folder / "state.npz"
        self.files = (folder / "features.f32", folder / "logits.f32")
        self.keep_rows = bool(identity["rows"])
        self.widths = (0, 0)

    def restore(self, dim: int) -> Moments:
        """Returns the saved moments where they are of the same thing, else fresh ones."""
        saved = self._read()
        if saved.get("identity") == self.identity:
            self.widths = tuple(int(w) for w in saved["widths"])
            moments = Moments.from_state(saved)
            if self._cut(len(moments)):
                return moments
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return Moments(dim)

    def _read(self) -> dict[str, np.ndarray]:
        """What state.npz holds; nothing where there is none, or a power cut tore it."""
        if not self.state.is_file():
            return {}
        try:
            return read_npz(self.state, lambda name: True, "partial sums")[1]
        except UserError:
            return {}

    def _cut(self, count: int) -> bool:
        """Drops rows that were appended after the last save; False if some are missing."""
        if self.keep_rows and count:
            for path, width in zip(self.files, self.widths, strict=True):
                size = count * width * 4
                if not path.is_file() or path.stat().st_size < size:
                    return False
                with path.open("r+b") as file:
                    file.truncate(size)
        return True

    def append(self, features: np.ndarray, logits: np.ndarray) -> None:
        if not self.keep_rows:
            return
        self.widths = (features.shape[1], logits.shape[1])
        for path, rows in zip(self.files, (features, logits), strict=True):
            try:
                with path.open("ab") as file:
                    file.write(np.ascontiguousarray(rows, np.float32).tobytes())
            except OSError as error:
                raise UserError(
                    f"Cannot write the features to {path}: {error.strerror}. Free space; the same "
                    "command goes on from what was saved."
                ) from error

    def save(self, moments: Moments) -> None:
        extra = {"identity": np.array(self.identity), "widths": np.array(self.widths)}
        write_npz(self.state, moments.state() | extra)

    def rows(self, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.keep_rows:
            return None, None
        return tuple(
            np.fromfile(path, np.float32).reshape(count, width)
            for path, width in zip(self.files, self.widths, strict=True)
        )
