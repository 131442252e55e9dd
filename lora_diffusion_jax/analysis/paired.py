"""Paired comparison of two kinds of runs: the same seeds, differences within a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 9_999
CONFIDENCE = 0.95
_EXACT = 13  # pairs up to which all sign flips are tried, at most 8,192


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

    The interval is the bias-corrected and accelerated bootstrap over seeds (Efron 1987), p the test of
    sign flips: exact up to 13 seeds, where it is a multiple of 2 / 2^n, else from 9,999 flips.

    Raises:
        ValueError: other than two arrays of one length, at least 2.
    """
    values, against = np.asarray(values, np.float64), np.asarray(against, np.float64)
    if values.shape != against.shape or values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"Pairs of shapes {values.shape} and {against.shape}; expected two of [n]."
        )
    differences = values - against
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # no spread to resample: all signs agree, or all are 0
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - len(values)))
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if len(values) <= _EXACT else RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): all below 0.05 are shown together at that level."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected.tolist()
