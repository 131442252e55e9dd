"""Paired comparison of two kinds of runs: the same seeds, differences within a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 9_999
CONFIDENCE = 0.95
MOST_EXACT = 13  # pairs up to which all sign flips are tried, at most 8,192


class Difference(NamedTuple):
    """A mean difference over seeds.

    Attributes:
        mean: of the differences.
        low: of its confidence interval.
        high: of it.
        p: two-sided, of the hypothesis that differences are symmetric about 0.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_difference(
    values: Float[np.ndarray, " seeds"], against: Float[np.ndarray, " seeds"]
) -> Difference:
    """The mean of values - against, with its confidence interval and p.

    The interval is the studentized bootstrap over seeds, p that of sign flips: exact up to 13 seeds, where it
    is a multiple of 2 / 2^n, else from 9,999 flips.

    Raises:
        ValueError: other than two finite arrays of one length, at least 2.
    """
    values, against = np.asarray(values, np.float64), np.asarray(against, np.float64)
    if values.shape != against.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"Pairs of shapes {values.shape} and {against.shape}; expected two of [n]."
        )
    if not np.isfinite([values, against]).all():
        raise ValueError(f"Pairs {values} and {against}; expected finite numbers.")
    differences = values - against
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # no spread to resample: all signs agree, or all are 0
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - len(values)))
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if len(values) <= MOST_EXACT else RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return Difference(mean, *studentized_interval(differences), float(test.pvalue))


def studentized_interval(sample: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The studentized bootstrap interval of a mean (Efron and Tibshirani 1993, section 12.5).

    mean - t_high s / sqrt(n) to mean - t_low s / sqrt(n), where t_low and t_high are quantiles over resamples
    of (mean* - mean) sqrt(n) / s*. With eight normal values it holds the mean in 95 of 100 cases, where
    percentile and BCa intervals do in 87. Resamples without spread have no t and are left out.
    """
    count, mean = len(sample), sample.mean()
    chosen = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    resamples = sample[chosen]
    spread = resamples.std(axis=1, ddof=1)
    whole = spread > 1e-9 * sample.std(ddof=1)
    t = (resamples[whole].mean(axis=1) - mean) / spread[whole]
    low, high = np.quantile(t, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    scale = sample.std(ddof=1)
    return float(mean - high * scale), float(mean - low * scale)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): all below 0.05 are shown together at that level."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected.tolist()
