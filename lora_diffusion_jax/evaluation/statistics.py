"""Mean and covariance of features, summed in float64, and the npz files that hold them."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.metrics import half_root
from lora_diffusion_jax.evaluation.npz import read_npz, write_npz

# Rows are added in blocks of this many, in order, whatever batches they arrive in: the sums, and
# with them a distance's last digits, do not depend on the batch size.
BLOCK = 500
WEIGHTS = "weights/"  # prefix of a detector's arrays in a reference file


class Sums(NamedTuple):
    """What a stream of feature vectors [n, D] comes to."""

    count: int  # rows merged into mean and scatter
    mean: np.ndarray  # float64 [D]
    scatter: np.ndarray  # float64 [D, D], sum of (x - mean)(x - mean)^T
    held: np.ndarray  # float32 [k, D], rows that wait for their block to fill

    def merged(self, rows: np.ndarray) -> "Sums":
        """The sums with some rows [n, D] in them, by Chan, Golub and LeVeque (1983).

        With d the difference of the means, M2 = M2_a + M2_b + d d^T n_a n_b / (n_a + n_b).
        """
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        total = self.count + len(rows)
        delta = mean - self.mean
        scatter = self.scatter + centred.T @ centred
        scatter += np.outer(delta, delta) * (self.count * len(rows) / total)
        return Sums(total, self.mean + delta * (len(rows) / total), scatter, self.held)


class Moments:
    """Streaming mean and unbiased covariance of feature vectors, in float64.

    The sums are replaced whole: where a signal breaks in, they are those before or after an `add`.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.sums = Sums(0, np.zeros(dim), np.zeros((dim, dim)), np.zeros((0, dim), np.float32))

    def __len__(self) -> int:
        return self.sums.count + len(self.sums.held)

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
        sums = self.sums._replace(held=np.concatenate([self.sums.held, features]))
        while len(sums.held) >= BLOCK:
            sums = sums.merged(sums.held[:BLOCK])._replace(held=sums.held[BLOCK:])
        self.sums = sums

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean [dim], covariance [dim, dim] with n - 1), float64; needs two rows."""
        if len(self) < 2:
            raise UserError(f"A covariance needs at least 2 images; there are {len(self)}.")
        whole = self.sums.merged(self.sums.held) if len(self.sums.held) else self.sums
        sigma = whole.scatter / (whole.count - 1)
        return whole.mean, (sigma + sigma.T) / 2

    def state(self) -> dict[str, np.ndarray]:
        """Returns everything needed to go on adding later, as arrays for an npz file."""
        return {name: np.asarray(value) for name, value in self.sums._asdict().items()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Moments":
        """Returns the Moments whose `state` this is; adding goes on bit for bit as before."""
        moments = cls(len(state["mean"]))
        arrays = (np.array(state[name]) for name in ("mean", "scatter", "held"))
        moments.sums = Sums(int(state["count"]), *arrays)
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
    def root(self) -> np.ndarray:
        """R [D, rank] with R R^T = sigma, kept: each Frechet distance needs it."""
        return half_root(self.sigma)

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


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads statistics in EDM's npz format (ours carry `meta` too).

    Raises:
      UserError: no file, a damaged one, or no mean and covariance in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no reference file {path}. Make one with: eval_fid.py ref --data=... "
            "--dest=FILE.npz"
        )
    ours = ("mu", "sigma", "meta", "features")
    expected = "EDM's reference format, the arrays mu and sigma"
    _, arrays = read_npz(path, lambda k: k in ours or k.startswith(WEIGHTS), expected)
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{path} holds no reference statistics: expected the arrays mu [D] and sigma [D, D]. "
            "If these are images, pass them with --images instead."
        )
    check_moments(arrays["mu"], arrays["sigma"], str(path))
    mu, sigma = (arrays[key].astype(np.float64) for key in ("mu", "sigma"))
    weights = {k.removeprefix(WEIGHTS): v for k, v in arrays.items() if k.startswith(WEIGHTS)}
    reference = Reference(mu, sigma, _meta(path, arrays), arrays.get("features"), weights)
    rows = reference.features
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != len(mu)):
        raise UserError(
            f"{path}: features has shape {rows.shape}; expected [N, {len(mu)}]. Make it anew."
        )
    return reference


def _meta(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    except json.JSONDecodeError:
        meta = None
    if not isinstance(meta, dict):
        raise UserError(
            f"{path}: its entry `meta` is not a JSON object, as this program writes it; the file was "
            "changed or damaged. Make it anew with: eval_fid.py ref"
        )
    return meta


def check_moments(mu: np.ndarray, sigma: np.ndarray, where: str) -> None:
    """Raises UserError unless mu [D] and sigma [D, D] are finite, and sigma is a covariance."""
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"{where}: mu has shape {mu.shape} and sigma {sigma.shape}; expected [D] and [D, D]."
        )
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise UserError(
            f"{where}: mu is {mu.dtype} and sigma {sigma.dtype}; expected real numbers (float64)."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{where}: mu or sigma holds NaN or infinity; these statistics are broken.")
    largest = np.abs(sigma - sigma.T).max(initial=0.0)
    if largest > 1e-4 * np.abs(sigma).max(initial=0.0):
        raise UserError(
            f"{where}: sigma differs from its transpose by up to {largest:.3g}; a covariance is "
            "symmetric. These statistics are broken."
        )
    # Positive semi-definite up to rounding, asked cheaply: the largest row sum bounds the norm.
    ridge = 1e3 * len(mu) * np.finfo(np.float64).eps * np.abs(sigma).sum(axis=0).max()
    try:
        np.linalg.cholesky(sigma + max(ridge, np.finfo(np.float64).tiny) * np.eye(len(mu)))
    except np.linalg.LinAlgError as error:
        raise UserError(
            f"{where}: sigma has negative eigenvalues; a covariance is positive semi-definite. These "
            "statistics are broken."
        ) from error
