import numpy as np
import pytest
import scipy.linalg

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.metrics import count_name, frechet_distance


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
