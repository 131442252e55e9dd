import itertools

import numpy as np
import pytest

from lora_diffusion_jax.analysis.paired import holm, paired_difference


def test_p_counts_the_sign_flips_that_are_as_extreme():
    against = np.arange(8.0)
    assert paired_difference(against + [1, 2, 3, 4, 5, 6, 7, 8], against).p == 2 / 256
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.25])
    flips = np.array(list(itertools.product([1, -1], repeat=5))) @ differences
    expected = np.mean(np.abs(flips) >= abs(differences.sum()) - 1e-12)
    assert paired_difference(differences, np.zeros(5)).p == pytest.approx(expected)


def test_the_interval_of_symmetric_differences_holds_95_percent_of_all_resamples():
    differences = np.array([-3.0, -1.0, 1.0, 3.0]) + 10  # no bias, no acceleration: plain quantiles
    means = np.array([np.mean(c) for c in itertools.product(differences, repeat=4)])
    found = paired_difference(differences, np.zeros(4))
    assert found.mean == 10
    inside = np.mean((means >= found.low) & (means <= found.high))
    assert 0.93 < inside < 0.99  # of 256 resamples with ties
    np.testing.assert_allclose([found.low, found.high], [7.5, 12.5], atol=0.5)


def test_skewed_differences_have_an_interval_of_unequal_sides():
    differences = np.array([0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 4.0])
    found = paired_difference(differences, np.zeros(8))
    assert found.high - found.mean > 1.5 * (found.mean - found.low)


def test_differences_without_spread():
    ones = np.ones(8)
    assert paired_difference(ones, ones) == (0, 0, 0, 1)
    assert paired_difference(3 * ones, ones) == (2, 2, 2, 2 / 256)


def test_other_than_pairs_is_refused():
    for values, against in ((np.ones(3), np.ones(4)), (np.ones(1), np.ones(1))):
        with pytest.raises(ValueError, match="expected two of"):
            paired_difference(values, against)


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02, 0.0078125]), [0.02, 0.015625])
    assert holm([]) == []
