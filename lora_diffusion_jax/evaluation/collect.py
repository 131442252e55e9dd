"""Features of a set of images, as metrics need them: moments always, rows if asked for; resumable."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, extract
from lora_diffusion_jax.evaluation.results import note, source_hash, to_line
from lora_diffusion_jax.evaluation.statistics import Moments
from lora_diffusion_jax.npz import read_npz, write_npz
from lora_diffusion_jax.processes import from_leader, is_leader
from lora_diffusion_jax.processes.interrupts import pause_point

SAVE_SECONDS = 30.0  # between saves of partial sums


class FeatureSet:
    """A set of images in one feature space.

    Args:
        dim: D, the number of features.
        keep_rows: keep the features and logits of every image, not their moments alone.
        partial: where they are saved while they grow; None: nowhere.
    """

    def __init__(self, dim: int, keep_rows: bool = False, partial: "Partial | None" = None):
        self.moments, self.keep_rows, self.partial = Moments(dim), keep_rows, partial
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.classes: np.ndarray | None = None  # asked for, int [N]; None: not known, or none

    def __len__(self) -> int:
        return len(self.moments)

    def add(self, features: np.ndarray, logits: np.ndarray) -> None:
        """Adds the features [n, D] and logits [n, K] of the next images."""
        if self.keep_rows:  # first: a signal before the sums leaves rows that `since` cuts off
            self.rows.append((features, logits))
        self.moments.add(features)

    def since(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the float32 features [n, D] and logits [n, K] of the images from `start` on."""
        if len(self.rows) > 1:
            features, logits = map(np.concatenate, zip(*self.rows, strict=True))
            self.rows = [(features, logits)]
        features, logits = self.rows[0]
        return features[start : len(self)], logits[start : len(self)]

    def remove_partial(self) -> None:
        """Removes what was saved while they grew."""
        if self.partial is not None:
            self.partial.remove()

    @property
    def features(self) -> np.ndarray | None:
        """float32 [n, D]; None if rows are not kept."""
        return self.since(0)[0] if self.keep_rows else None

    @property
    def logits(self) -> np.ndarray | None:
        """float32 [n, K]; None if rows are not kept."""
        return self.since(0)[1] if self.keep_rows else None


def collect(
    detector: Detector, batches: Iterable[np.ndarray], *, keep_rows: bool = False
) -> FeatureSet:
    """Returns the features of all uint8 image batches [n, H, W, C], kept in memory."""
    found = FeatureSet(detector.feature_dim, keep_rows)
    for features, logits in extract(detector, batches):
        found.add(features, logits)
    return found


def collect_resumable(
    detector: Detector,
    batches_from: Callable[[int], Iterable[np.ndarray]],
    total: int,
    home: Path,
    identity: Mapping[str, object],
    *,
    keep_rows: bool = False,
    mesh: Mesh | None = None,
) -> FeatureSet:
    """Like `collect`, but a killed run continues where it last saved, to the same result bit for bit.

    With several processes all must call this alike; only the result of process 0 is complete.

    Args:
        detector: the feature space.
        batches_from: k -> the images from number k on; image k must not depend on those before it.
        total: number of images.
        home: a folder for the sums while they grow; `FeatureSet.remove_partial` cleans up.
        identity: JSON values that differ between different sets of images.
        keep_rows: keep features and logits of every image.
        mesh: devices; None: all.

    Raises:
        UserError: not exactly `total` images, or another process is computing the same sums.
    """
    partial = Partial(home, {**identity, "detector": detector.hash, "rows": keep_rows})
    found = FeatureSet(detector.feature_dim, keep_rows, partial)
    with contextlib.ExitStack() as stack:

        def begin() -> int:
            stack.enter_context(partial.lock())
            partial.restore(found)
            return len(found)

        done = from_leader("reading the partial sums", begin)
        bar = tqdm(
            total=total,
            initial=done,
            desc=f"{detector.name} features",
            unit="img",
            disable=None if is_leader() else True,
        )
        saved_at = time.monotonic()
        try:
            with bar:
                batches = batches_from(done) if done < total else ()
                for features, logits in extract(detector, batches, mesh=mesh):
                    pause_point()
                    done += len(features)
                    bar.update(len(features))
                    if is_leader():
                        found.add(features, logits)
                        if time.monotonic() - saved_at >= SAVE_SECONDS:
                            partial.save(found)
                            saved_at = time.monotonic()
        except BaseException:  # signals included
            if len(found):
                partial.save(found)
            raise
        if done != total:
            raise UserError(f"{total} images were requested, but there are {done}.")
        if is_leader():
            partial.save(found)
        return found


class Partial:
    """The sums of an unfinished FeatureSet on disk: state.npz, and the rows added before each save.

    Args:
        home: folder below which they are kept.
        identity: what the sums are of; sums of the same by other code are discarded.
    """

    def __init__(self, home: Path, identity: Mapping[str, object]):
        key = hashlib.sha256(to_line(dict(identity)).encode()).hexdigest()[:16]
        self.home, self.folder = home, home / "partial" / key
        self.saved = 0  # images

    @property
    def _lock_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    def lock(self) -> files.Lock:
        """Takes the lock against other programs that compute the same sums."""
        advice = "Make it writable, or choose another with the environment variable"
        with files.disk_errors(self.folder, f"{advice} LORA_DIFFUSION_CACHE."):
            files.make_folder(self.folder, self.home)
        taken = f"Another process is computing the same result in {self.folder}; wait or stop it."
        return files.Lock(self._lock_file, taken)

    def restore(self, found: FeatureSet) -> None:
        """Puts what was saved into an empty set; discards what is damaged or of another version."""
        if not (self.folder / "state.npz").exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # rows before the first state
            return
        try:
            state = self._read(self.folder / "state.npz")
            if str(state["code"]) != source_hash():
                raise UserError(f"{self.folder} was written by another version of the program.")
            moments = Moments.from_state(state)
            if found.keep_rows:
                found.rows = self._read_rows(len(moments))
            found.moments = moments
        except (UserError, KeyError, ValueError) as error:
            note(f"the partial sums are computed again: {error}")
            shutil.rmtree(self.folder, ignore_errors=True)
        self.saved = len(found)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        return read_npz(path, lambda name: True, "partial sums")[1]

    def _read_rows(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of the first `count` images; a file is named by the first image in it."""
        starts = sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))
        starts = [start for start in starts if start < count]
        rows = []
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            part = self._read(self._rows_file(start))
            rows.append((part["features"][: stop - start], part["logits"][: stop - start]))
        if sum(len(features) for features, _ in rows) != count:
            raise UserError(f"{self.folder} is incomplete.")
        return rows

    def _rows_file(self, start: int) -> Path:
        return self.folder / f"{start:010d}.npz"

    def save(self, found: FeatureSet) -> None:
        """Saves what was added since the last save; interrupted anywhere, it can be repeated."""
        if found.keep_rows and len(found) > self.saved:
            features, logits = found.since(self.saved)
            write_npz(self._rows_file(self.saved), {"features": features, "logits": logits})
        state = found.moments.state() | {"code": np.array(source_hash())}
        write_npz(self.folder / "state.npz", state)
        self.saved = len(found)

    def remove(self) -> None:
        """Removes the folder and its lock, in process 0."""
        if is_leader():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock_file.unlink(missing_ok=True)
