"""Mean and covariance of features, summed in float64."""

from typing import NamedTuple

import numpy as np

from lora_diffusion_jax.errors import UserError

# Rows are added in blocks of this many, in order, whatever batches they arrive in: the sums, and
# with them a distance's last digits, do not depend on the batch size.
BLOCK = 500


class Sums(NamedTuple):
    """The sums over a stream of feature vectors [n, D]."""

    count: int  # type: ignore[assignment]  # rows merged into mean and scatter
    mean: np.ndarray  # float64 [D]
    scatter: np.ndarray  # float64 [D, D], sum of (x - mean)(x - mean)^T
    held: np.ndarray  # float32 [k, D], rows waiting for their block to fill

    def merged(self, rows: np.ndarray) -> "Sums":
        """Returns the sums with some rows [n, D] added (Chan, Golub and LeVeque 1983).

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

    Args:
        dim: D, the length of a feature vector.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.sums = Sums(0, np.zeros(dim), np.zeros((dim, dim)), np.zeros((0, dim), np.float32))

    def __len__(self) -> int:
        return self.sums.count + len(self.sums.held)

    def add(self, features: np.ndarray) -> None:
        """Adds rows [n, D]; a row with NaN or infinity is a UserError."""
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise UserError(
                f"The features of image {len(self) + int(bad[0])} are not finite ({len(bad)} such "
                f"images among {len(features)}). Check that image and the feature weights."
            )
        sums = self.sums._replace(held=np.concatenate([self.sums.held, features]))
        while len(sums.held) >= BLOCK:
            sums = sums.merged(sums.held[:BLOCK])._replace(held=sums.held[BLOCK:])
        self.sums = sums  # at once: a signal meets the sums before or after this call

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean [D], covariance [D, D] with n - 1), float64; needs at least two rows."""
        if len(self) < 2:
            raise UserError(f"A covariance needs at least 2 images; there are {len(self)}.")
        whole = self.sums.merged(self.sums.held) if len(self.sums.held) else self.sums
        sigma = whole.scatter / (whole.count - 1)
        return whole.mean, (sigma + sigma.T) / 2

    def state(self) -> dict[str, np.ndarray]:
        """Returns everything needed to continue adding later, as arrays for an npz file."""
        return {name: np.asarray(value) for name, value in self.sums._asdict().items()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Moments":
        """Returns the Moments with this `state`; adding continues bit for bit as before."""
        moments = cls(len(state["mean"]))
        arrays = (np.array(state[name]) for name in ("mean", "scatter", "held"))
        moments.sums = Sums(int(state["count"]), *arrays)
        return moments
