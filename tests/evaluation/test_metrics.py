import numpy as np
import pytest
import scipy.linalg

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.metrics import (
    count_name,
    frechet_distance,
    inception_score,
    kernel_distance,
    squared_mmd,
)


def moments(rng, dim, count=None):
    """Mean and covariance of random rows whose scales span two orders of magnitude."""
    mix = rng.normal(size=(dim, dim)) * np.logspace(0, -2, dim)
    rows = rng.normal(size=(count or 4 * dim, dim)) @ mix
    return rows.mean(0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize("dim", [2, 16, 96])
def test_equals_scipys_matrix_square_root(dim):
    rng = np.random.default_rng(dim)
    (mu1, sigma1), (mu2, sigma2) = moments(rng, dim), moments(rng, dim)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    # sqrtm of a product of ill-conditioned matrices is itself good to about 1e-9
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    a, b = rng.uniform(0, 2, 40), rng.uniform(0, 2, 40)
    a[:7] = 0  # singular
    mu = rng.normal(size=40)
    got = frechet_distance(mu, (basis * a**2) @ basis.T, np.zeros(40), (basis * b**2) @ basis.T)
    assert got == pytest.approx(mu @ mu + ((a - b) ** 2).sum(), rel=1e-12)


def test_fewer_images_than_features_is_exact():
    # rank 19 of 200: the distance of a set to itself is zero, to its double closed form
    mu, sigma = moments(np.random.default_rng(2), 200, count=20)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-12 * np.trace(sigma)
    got = frechet_distance(mu, sigma, mu, 4 * sigma)  # tr(S + 4S - 2*2S)
    assert got == pytest.approx(np.trace(sigma), rel=1e-12)


def test_is_symmetric_and_ignores_rotation():
    rng = np.random.default_rng(3)
    one, two = moments(rng, 30), moments(rng, 30, count=12)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    turned = [(basis @ mu, basis @ sigma @ basis.T) for mu, sigma in (one, two)]
    value = frechet_distance(*one, *two)
    assert frechet_distance(*two, *one) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(value, rel=1e-10)


def test_constant_images_are_no_special_case():
    zero = np.zeros((3, 3))
    assert frechet_distance(np.ones(3), zero, np.zeros(3), zero) == 3.0
    assert frechet_distance(np.ones(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(6.0)


def test_different_features_and_broken_covariances_are_errors():
    with pytest.raises(UserError, match="different features"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match="positive semi-definite"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))


@pytest.mark.parametrize(
    ("count", "name"), [(1000, "1k"), (50000, "50k"), (1797, "1797"), (9, "9")]
)
def test_count_name(count, name):
    assert count_name(count) == name


def test_squared_mmd_equals_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(15, 4)), rng.normal(size=(15, 4)) + 0.3

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    pairs = [(i, j) for i in range(15) for j in range(15)]
    expected = (
        np.mean([k(x[i], x[j]) for i, j in pairs if i != j])
        + np.mean([k(y[i], y[j]) for i, j in pairs if i != j])
        - 2 * np.mean([k(x[i], y[j]) for i, j in pairs])
    )
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    rng = np.random.default_rng(1)
    real, same, other = (rng.normal(size=(600, 8)) + m for m in (0, 0, 0.5))
    value, deviation = kernel_distance(real, same, subsets=50, subset_size=200)
    assert abs(value) < deviation
    # the shift moves the mean of the linear part by 3 |shift|^2 / D and the rest up
    assert kernel_distance(real, other, subsets=50, subset_size=200)[0] > 3 * 0.25
    assert kernel_distance(real, same, subsets=5, subset_size=200) == kernel_distance(
        real, same, subsets=5, subset_size=200
    )


def test_inception_score_closed_forms():
    sure = np.eye(7)[np.arange(700) % 7] * 200.0  # every image certain, classes even
    assert inception_score(sure, splits=1) == (pytest.approx(7.0), 0.0)
    assert inception_score(np.zeros((50, 9))) == (pytest.approx(1.0), pytest.approx(0.0))
    # two kinds of images, each certain of one of two classes with probability 3/4
    p = np.array([[0.75, 0.25], [0.25, 0.75]])
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    score, _ = inception_score(np.log(np.tile(p, (50, 1))), splits=1)
    assert score == pytest.approx(np.exp(kl), rel=1e-12)
    # sorted files do not matter: the parts are dealt at random
    assert inception_score(np.repeat(np.eye(5) * 50.0, 200, axis=0), splits=5)[0] > 4.9
