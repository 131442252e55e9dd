"""Distances between sets of images, computed in float64 from their features."""

import numpy as np

from lora_diffusion_jax.errors import UserError


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    d = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)

    With R_i R_i^T = S_i from symmetric eigen-decompositions, the last trace is the sum of the
    singular values of R_1^T R_2: nothing can turn complex, no epsilon is added, and small
    directions keep their digits, which the square root of a product's eigenvalues would lose.
    Directions that carry only rounding error (fewer images than features) are left out.

    Args:
      mu1: mean [D] of the first set.
      sigma1: its covariance [D, D], symmetric positive semi-definite.
      mu2: mean [D] of the second set.
      sigma2: its covariance [D, D].

    Returns:
      The distance; rounding can make it negative by about 1e-12 of the traces.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if not (mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == 2 * mu1.shape):
        raise UserError(
            f"The two sets have statistics of different features: mu {mu1.shape} and {mu2.shape}, "
            f"sigma {sigma1.shape} and {sigma2.shape}. Compute both with the same --features."
        )
    covered = np.linalg.svd(_half_root(sigma1).T @ _half_root(sigma2), compute_uv=False).sum()
    gap = mu1 - mu2
    return float(gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2.0 * covered)


def _half_root(sigma: np.ndarray) -> np.ndarray:
    """Returns R [D, rank] with R R^T = sigma, from its eigenvalues above rounding error."""
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    floor = len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if values[0] < -1e3 * floor:
        raise UserError(
            f"A covariance has the eigenvalue {values[0]:.3g} (largest {values[-1]:.3g}); it must "
            "be positive semi-definite. The statistics are broken."
        )
    kept = values > floor
    return vectors[:, kept] * np.sqrt(values[kept])


def count_name(count: int) -> str:
    """Names a number of images as metrics do: 50000 -> '50k', 1000 -> '1k', 1234 -> '1234'."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
