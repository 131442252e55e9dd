import itertools

import numpy as np
import pytest

from lora_diffusion_jax.analysis.paired import holm, paired_difference, studentized_interval


def test_p_counts_the_sign_flips_that_are_as_extreme():
    against = np.arange(8.0)
    assert paired_difference(against + [1, 2, 3, 4, 5, 6, 7, 8], against).p == 2 / 256
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.25])
    flips = np.array(list(itertools.product([1, -1], repeat=5))) @ differences
    expected = np.mean(np.abs(flips) >= abs(differences.sum()) - 1e-12)
    assert paired_difference(differences, np.zeros(5)).p == pytest.approx(expected)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """Normal values, and skewed ones, for which percentile intervals fail twice as often."""
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(400, 8)), rng.exponential(size=(400, 8)) - 1):
        intervals = np.array([studentized_interval(sample) for sample in values])
        held = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
        assert 0.92 <= held <= 0.98


def test_the_interval_moves_and_scales_with_the_differences():
    values = np.array([0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 4.0])
    low, high = studentized_interval(values)
    np.testing.assert_allclose(studentized_interval(5 + 2 * values), [5 + 2 * low, 5 + 2 * high])
    assert high - values.mean() > values.mean() - low  # skewed to the right


def test_differences_without_spread():
    ones = np.ones(8)
    assert paired_difference(ones, ones) == (0, 0, 0, 1)
    assert paired_difference(3 * ones, ones) == (2, 2, 2, 2 / 256)


def test_beyond_13_seeds_sign_flips_are_drawn():
    differences = np.arange(14.0) - 4
    flips = np.array(list(itertools.product([1, -1], repeat=14))) @ differences
    exact = np.mean(np.abs(flips) >= abs(differences.sum()))
    assert paired_difference(differences, np.zeros(14)).p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("values", "against"),
    [(np.ones(3), np.ones(4)), (np.ones(1), np.ones(1)), (np.array([1, np.nan]), np.ones(2))],
)
def test_other_than_pairs_is_refused(values, against):
    with pytest.raises(ValueError, match="expected"):
        paired_difference(values, against)


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02, 0.0078125]), [0.02, 0.015625])
    assert holm([]) == []
