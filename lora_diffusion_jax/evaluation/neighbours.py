"""Metrics from nearest neighbours in feature space: precision, recall, density, coverage, copies."""

from collections.abc import Iterator

import numpy as np

BLOCK = 1000  # rows compared at a time; memory grows with BLOCK times the other set's size


def manifold_metrics(
    real: np.ndarray, fake: np.ndarray, *, near: int = 3, dense: int = 5
) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of a row reaches to its k-th nearest neighbour in its own set. Precision: share of
    fake rows in some real row's ball. Recall: share of real rows in some fake row's ball.
    Density: mean number of real balls that hold a fake row, divided by k. Coverage: share of real
    balls that hold a fake row.

    Args:
        real: features [n, D], n > dense.
        fake: features [m, D], m > near.
        near: k of precision and recall.
        dense: k of density and coverage.
    """
    radii_real = neighbour_distances(real, (near, dense))
    radii_fake = neighbour_distances(fake, (near,))[:, 0]
    inside = held = 0
    reached = np.zeros(len(real), bool)
    covered = np.zeros(len(real), bool)
    for rows, squared in _distances(fake, real):
        distances = np.sqrt(squared)
        inside += int((distances <= radii_real[:, 0]).any(axis=1).sum())
        reached |= (distances <= radii_fake[rows, None]).any(axis=0)
        dense_hits = distances < radii_real[:, 1]
        held += int(dense_hits.sum())
        covered |= dense_hits.any(axis=0)
    return {
        "precision": inside / len(fake),
        "recall": float(reached.mean()),
        "density": held / (dense * len(fake)),
        "coverage": float(covered.mean()),
    }


def memorisation(
    samples: np.ndarray, train: np.ndarray, *, ratio: float = 1 / 3
) -> dict[str, float]:
    """How close samples come to training images.

    A sample counts as a copy if its nearest training image is closer than `ratio` times the
    second nearest (Yoon et al. 2023), in these features.

    Args:
        samples: features [n, D].
        train: features [m, D] of the training images, m >= 3.
        ratio: threshold in (0, 1).

    Returns:
        {'memorised': share of copies, 'nearest_distance': median distance from a sample to its
        nearest training image, 'nearest_distance_real': the same from training images to their
        nearest others, for scale}.
    """
    nearest = np.concatenate(
        [np.sqrt(np.partition(block, 1, axis=1)[:, :2]) for _, block in _distances(samples, train)]
    )
    own = neighbour_distances(train, (1,))
    return {
        "memorised": float((nearest[:, 0] < ratio * nearest[:, 1]).mean()),
        "nearest_distance": float(np.median(nearest[:, 0])),
        "nearest_distance_real": float(np.median(own)),
    }


def neighbour_distances(rows: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """Returns the distances [n, len(ranks)] of each row to its k-th nearest others."""
    found = []
    for chosen, squared in _distances(rows, rows):
        squared[np.arange(len(squared)), chosen] = -1.0  # the row itself comes first
        found.append(np.sqrt(np.partition(squared, ranks, axis=1)[:, ranks]))
    return np.concatenate(found)


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (row numbers of a, squared distances [block, len(b)] to all of b), in float64.

    Both sets are moved by the mean of b, which keeps |a|^2 + |b|^2 - 2 a.b from cancelling.
    """
    b = np.asarray(b, np.float64)
    centre = b.mean(axis=0)
    b = b - centre
    norms = np.square(b).sum(axis=1)
    for start in range(0, len(a), BLOCK):
        block = np.asarray(a[start : start + BLOCK], np.float64) - centre
        squared = np.square(block).sum(axis=1)[:, None] + norms - 2.0 * (block @ b.T)
        yield np.arange(start, start + len(block)), np.maximum(squared, 0.0)
