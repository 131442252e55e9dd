"""Mean and covariance of features, summed in float64, and the npz files that hold them."""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError

# Rows are added in blocks of this many, in order, whatever batches they arrive in: the sums, and
# with them a distance's last digits, do not depend on the batch size.
BLOCK = 500
WEIGHTS = "weights/"  # prefix of a detector's arrays in a reference file


class Moments:
    """Streaming mean and unbiased covariance of feature vectors, in float64.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1983):
    with d the difference of the means, M2 = M2_a + M2_b + d d^T n_a n_b / (n_a + n_b).
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.count = 0  # rows merged; `held` rows wait for their block to fill
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T
        self.held = np.zeros((0, dim), np.float32)

    def __len__(self) -> int:
        return self.count + len(self.held)

    def add(self, features: np.ndarray) -> None:
        """Adds rows [n, dim]; a row with NaN or infinity is a UserError."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(
                f"Features have shape {features.shape}; these statistics hold [n, {self.dim}]."
            )
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise UserError(
                f"The features of image {len(self) + int(bad[0])} are not finite ({len(bad)} such "
                f"images among {len(features)}). Look at that image and at the feature weights."
            )
        self.held = np.concatenate([self.held, features])
        while len(self.held) >= BLOCK:
            self._merge(self.held[:BLOCK])
            self.held = self.held[BLOCK:]

    def _merge(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        total = self.count + len(rows)
        delta = mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += np.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean [dim], covariance [dim, dim] with n - 1), float64; needs two rows."""
        if len(self) < 2:
            raise UserError(f"A covariance needs at least 2 images; there are {len(self)}.")
        whole = Moments(self.dim)
        whole.count, whole.mean, whole.scatter = self.count, self.mean.copy(), self.scatter.copy()
        if len(self.held):
            whole._merge(self.held)
        sigma = whole.scatter / (whole.count - 1)
        return whole.mean, (sigma + sigma.T) / 2

    def state(self) -> dict[str, np.ndarray]:
        """Returns everything needed to go on adding later, as arrays for an npz file."""
        return {
            "count": np.int64(self.count),
            "mean": self.mean,
            "scatter": self.scatter,
            "held": self.held,
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Moments":
        """Returns the Moments whose `state` this is; adding goes on bit for bit as before."""
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        moments.mean, moments.scatter = np.array(state["mean"]), np.array(state["scatter"])
        moments.held = np.array(state["held"])
        return moments


def moments_of(batches: Iterable[np.ndarray], dim: int) -> Moments:
    """Returns the Moments of an iterable of feature batches [n, dim]."""
    moments = Moments(dim)
    for batch in batches:
        moments.add(batch)
    return moments


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics to compare with, and what is known about them.

    Attributes:
      mu: mean [D], float64.
      sigma: covariance [D, D], float64.
      meta: JSON values: images, features, detector_hash, ...; empty for files of other tools.
      features: float32 [n, D], where the rows were kept: kernel distances and neighbours need them.
      weights: arrays of the detector where it was trained on the dataset itself, by path.
    """

    mu: np.ndarray
    sigma: np.ndarray
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    features: np.ndarray | None = None
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of mu and sigma."""
        digest = hashlib.sha256(np.ascontiguousarray(self.mu, np.float64).tobytes())
        digest.update(np.ascontiguousarray(self.sigma, np.float64).tobytes())
        return digest.hexdigest()[:16]


def save_reference(path: str | os.PathLike[str], reference: Reference) -> None:
    """Writes EDM's npz format: `mu` [D] and `sigma` [D, D] in float64.

    What EDM's readers do not know lies beside them under keys of its own: `meta` (a JSON text),
    `features` where the rows are kept, and `weights/...` of a detector that was trained on the
    dataset itself, so that the file is all one needs. It appears whole or not at all.
    """
    arrays = {
        "mu": np.asarray(reference.mu, np.float64),
        "sigma": np.asarray(reference.sigma, np.float64),
        "meta": np.array(json.dumps(reference.meta, sort_keys=True)),
    }
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    arrays |= {WEIGHTS + name: value for name, value in reference.weights.items()}
    write_npz(path, arrays)


def write_npz(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz through a temporary file beside it, so that a kill leaves no half file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Choose a path that can be written."
        ) from error


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads statistics in EDM's npz format (ours carry `meta` too); bad files are UserErrors."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no reference file {path}. Make one with: eval_fid.py ref --data=... "
            f"--dest={path}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            wanted = ("mu", "sigma", "meta", "features")
            arrays = {k: file[k] for k in file.files if k in wanted or k.startswith(WEIGHTS)}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{path} is not a readable npz file ({error}); expected EDM's reference format with "
            "the arrays mu and sigma."
        ) from error
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{path} holds no reference statistics: expected the arrays mu [D] and sigma [D, D]. "
            "If these are images, pass them with --images instead."
        )
    mu, sigma = (arrays[key].astype(np.float64) for key in ("mu", "sigma"))
    check_moments(mu, sigma, str(path))
    meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    weights = {k.removeprefix(WEIGHTS): v for k, v in arrays.items() if k.startswith(WEIGHTS)}
    return Reference(mu, sigma, meta, arrays.get("features"), weights)


def check_moments(mu: np.ndarray, sigma: np.ndarray, where: str) -> None:
    """Raises UserError unless mu is [D], sigma [D, D], and both are finite."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"{where}: mu has shape {mu.shape} and sigma {sigma.shape}; expected [D] and [D, D]."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{where}: mu or sigma holds NaN or infinity; these statistics are broken.")
