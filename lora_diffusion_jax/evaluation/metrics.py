"""Distances between sets of images, computed in float64 from their features."""

import numpy as np

from lora_diffusion_jax.errors import UserError


def frechet_distance(
    mu1: np.ndarray,
    sigma1: np.ndarray,
    mu2: np.ndarray,
    sigma2: np.ndarray,
    *,
    root2: np.ndarray | None = None,
) -> float:
    """Squared Frechet distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    d = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)

    With R_i R_i^T = S_i from symmetric eigen-decompositions, the last trace is the sum of the
    singular values of R_1^T R_2: nothing can turn complex, no epsilon is added, and small
    directions keep their digits, which the square root of a product's eigenvalues would lose.
    Directions of rounding error alone (fewer images than features) are dropped.

    Args:
        mu1, mu2: means [D].
        sigma1, sigma2: covariances [D, D], symmetric positive semi-definite.
        root2: `half_root(sigma2)`, if it is known already.

    Returns:
        The distance; rounding can make it negative by about 1e-12 of the traces.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if not (mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == 2 * mu1.shape):
        raise UserError(
            f"The statistics come from different features: mu {mu1.shape} and {mu2.shape}, "
            f"sigma {sigma1.shape} and {sigma2.shape}. Compute both with the same --features."
        )
    root2 = half_root(sigma2) if root2 is None else root2
    covered = np.linalg.svd(half_root(sigma1).T @ root2, compute_uv=False).sum()
    gap = mu1 - mu2
    return float(gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2.0 * covered)


def half_root(sigma: np.ndarray) -> np.ndarray:
    """Returns R [D, rank] with R R^T = sigma, from its eigenvalues above rounding error.

    Raises:
        UserError: an eigenvalue is negative beyond rounding.
    """
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    floor = len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if values[0] < -1e3 * floor:
        raise UserError(
            f"A covariance has the eigenvalue {values[0]:.3g} (largest {values[-1]:.3g}); it must "
            "be positive semi-definite. These statistics are damaged; recreate them."
        )
    kept = values > floor
    return vectors[:, kept] * np.sqrt(values[kept])


def count_name(count: int) -> str:
    """Names a number of images as metrics do: 50000 -> '50k', 1000 -> '1k', 1234 -> '1234'."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def kernel_distance(
    features1: np.ndarray,
    features2: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance (KID; Binkowski et al. 2018): mean and deviation over random subsets.

    Each of `subsets` pairs of subsets, drawn without repetition, gives one unbiased estimate of
    the squared maximum mean discrepancy.

    Args:
        features1: [n, D] of one set, n >= subset_size.
        features2: [m, D] of the other, m >= subset_size.
        subsets: number of pairs.
        subset_size: rows in each subset.
        seed: of the subsets.

    Returns:
        (mean, population standard deviation) of the estimates; the mean can be negative.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows = [rng.choice(len(f), subset_size, replace=False) for f in (features1, features2)]
        values.append(squared_mmd(features1[rows[0]], features2[rows[1]]))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / x.shape[1] + 1.0) ** 3

    def off_diagonal_mean(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    inside = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    return float(inside - 2.0 * kernel(x, y).mean())


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016): exp of the mean divergence KL(p(y|x) | p(y)).

    Args:
        logits: [n, K], n >= splits, without the output layer's bias, as in all published scores.
        splits: parts of equal size whose scores are averaged.
        seed: of the random assignment to the parts (files are often sorted by class).

    Returns:
        (mean, population standard deviation) over the parts.
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = []
    for part in np.array_split(np.asarray(logits)[order], splits):
        z = part.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore"):
            log_marginal = np.log(p.mean(axis=0))
        terms = np.where(p > 0, p * (log_p - log_marginal), 0.0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
