"""Both likelihoods of Gaussian data, whose exact value is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lora_diffusion_jax.diffusion.likelihood import (
    LEVEL,
    flow_bits,
    flow_bits_of_levels,
    flow_levels,
    variational_bound,
)
from lora_diffusion_jax.diffusion.precond import ALL_LEVELS, DDPM, EDM, IDDPM, VP
from lora_diffusion_jax.diffusion.samplers import BoundDenoiser
from lora_diffusion_jax.errors import UserError
from tests.diffusion.toy import LEVELS, MEAN, STD, ideal, ideal_of_levels
from tests.small import fast_jit

DRAWS = stats.norm.ppf((np.arange(512) + 0.5) / 512)  # a normal distribution without chance
DRAWS /= DRAWS.std()


def exact_bits(images):
    """-log2 of the density N(MEAN, STD^2), the mean over each image."""
    return -stats.norm.logpdf(images, MEAN, STD).mean(axis=(1, 2, 3)) / np.log(2)


EDGES = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
CHANCES = np.diff(stats.norm.cdf((EDGES - MEAN) / STD))  # of Gaussian data rounded to gray levels


def bound_by_integrals(betas, variance):
    """The bound of the ideal network of such pixels, in float64 and without drawing anything.

    Given x_t, x_0 has a mean and a variance, and with them the expectation of the divergence is a
    formula. What is left is an integral over x_t, whose density is a sum of 256 normal ones.
    """
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    posterior = betas * (1 - before) / (1 - abar)
    nats = 0.5 * CHANCES @ (abar[-1] * LEVELS**2 - abar[-1] - np.log(1 - abar[-1]))
    for t, sigma in enumerate(np.sqrt(1 / abar - 1)):
        x = np.arange(-1 - 7 * sigma, 1 + 7 * sigma, sigma / 8)[:, None]
        joint = CHANCES * stats.norm.pdf(x, LEVELS, sigma)
        density = joint.sum(axis=1)
        given = joint / np.maximum(density, 1e-300)[:, None]
        mean = given @ LEVELS
        spread = np.sum(given * (LEVELS - mean[:, None]) ** 2, axis=1)
        exact = posterior[t] + betas[t] ** 2 * before[t] / (1 - abar[t]) ** 2 * spread
        low, high = posterior[max(t, 1)], betas[t]
        chosen = {"low": low + 0 * exact, "high": high + 0 * exact, "exact": exact}[variance]
        chosen = np.clip(chosen, low, high)
        if t:
            term = 0.5 * (exact / chosen - 1 + np.log(chosen / posterior[t]))
        else:
            cdf = stats.norm.cdf((EDGES - mean[:, None]) / np.sqrt(chosen)[:, None])
            term = -np.sum(given * np.log(np.maximum(np.diff(cdf), 1e-12)), axis=1)
        nats += sigma / 8 * density @ term
    return nats / np.log(2)


NODES = 16  # of the quadrature over the noise; too few for the least levels of 4000 steps
SLOW = pytest.mark.slow
GAPS = [  # schedule, steps, variance, bits by which the bound exceeds the exact ones
    ("cosine", 100, "exact", 0.0001),
    ("cosine", 100, "low", 1.02),
    ("cosine", 100, "high", 0.0394),
    ("linear", 100, "exact", 0.0001),
    pytest.param("linear", 1000, "exact", 0.0009, marks=SLOW),
    pytest.param("linear", 1000, "high", 0.0085, marks=SLOW),
    pytest.param("cosine", 1000, "exact", 0.0048, marks=SLOW),
]


@pytest.mark.parametrize(("schedule", "num_steps", "variance", "gap"), GAPS)
def test_the_bound_of_gray_levels(schedule, num_steps, variance, gap):
    """The bound of an ideal network, beside its integrals and the exact bits.

    Reverse steps of a normal distribution and the exact variance are within 1e-3 bits as long as the
    least noise level is above the distance of gray levels. Below it, the steps from level to level are
    not normal, and the bound itself is loose.
    """
    precond = DDPM(schedule, num_steps)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    images = np.repeat(LEVELS, NODES).reshape(-1, 1, 1, 1).astype(np.float32)
    noise = np.tile(nodes, 256).reshape(images.shape).astype(np.float32)
    noise = np.broadcast_to(noise, (num_steps, *noise.shape))
    denoise = ideal_of_levels(precond, CHANCES, variance)
    prior, terms = fast_jit(lambda x: variational_bound(denoise, x, noise=noise))(images)
    assert terms.shape == (len(images), num_steps)
    total = np.asarray(prior, np.float64) + np.asarray(terms, np.float64).sum(axis=1)
    bits = CHANCES @ total.reshape(256, NODES) @ weights / weights.sum()
    # With the least variance the decoder's tails count, where the tanh formula and float32 are off.
    tolerance = 5e-3 if variance == "low" else 1e-4
    assert abs(bits - bound_by_integrals(precond.process.betas, variance)) < tolerance
    exact = -CHANCES @ np.log2(CHANCES)
    assert abs(bits - exact - gap) < tolerance
    assert exact < bits


@pytest.mark.parametrize("precond", [EDM(), VP(), IDDPM(), DDPM(), DDPM("linear", 1000)])
def test_the_flow_has_the_density_of_the_data(precond):
    # Draws of both signs in each image: the normal density at the end, of mean 0, is wrong by MEAN z / 80.
    images = (
        (MEAN + STD * DRAWS.reshape(16, 16, 2)).transpose(2, 0, 1)[..., None].astype(np.float32)
    )
    probe = np.random.default_rng(0).choice(np.float32([-1, 1]), images.shape)
    found = fast_jit(lambda x: flow_bits(ideal(precond), x, probe))(images)
    np.testing.assert_allclose(found, exact_bits(images), atol=6e-4)
    # Of second order: a quarter of the steps is 16 times as far off.
    coarse = fast_jit(lambda x: flow_bits(ideal(precond), x, probe, flow_levels(precond, 64)))
    assert 3e-3 < abs(coarse(images).mean() - exact_bits(images).mean()) < 6e-3


def test_one_probe_estimates_the_trace():
    """Data that are normal along the diagonal of two pixels: the Jacobian is not diagonal."""
    covariance = np.float32([[0.08, 0.06], [0.06, 0.08]])

    def denoise(x, sigma):
        total = covariance + sigma**2 * np.eye(2, dtype=np.float32)
        gain = jnp.linalg.solve(total, covariance)
        return (x.reshape(-1, 2) @ gain).reshape(x.shape)

    images = np.float32([[0.3, 0.1]] * 4).reshape(4, 1, 2, 1)
    probe = np.float32([[1, 1], [1, -1], [-1, 1], [-1, -1]]).reshape(4, 1, 2, 1)
    found = fast_jit(lambda x: flow_bits(denoise, x, probe))(images)
    exact = -stats.multivariate_normal.logpdf([0.3, 0.1], cov=covariance) / 2 / np.log(2)
    assert np.ptp(found) > 0.1  # each estimate is off, their mean over all probes is exact
    assert abs(found.mean() - exact) < 1e-3


def test_gray_levels_have_the_mean_density_in_them():
    """Of 8 bits: the data's own rounding; the noise inside a level costs a Jensen gap, here 1e-4."""
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    rng = np.random.default_rng(1)
    images = np.round((MEAN + STD * rng.normal(size=(8, 16, 16, 1)) + 1) * 127.5) / 127.5 - 1
    images = images.astype(np.float32)
    denoise = ideal(EDM())
    found = fast_jit(lambda x, keys: flow_bits_of_levels(denoise, x, keys))(images, keys)
    upper, lower = (stats.norm.cdf((images + s * LEVEL / 2 - MEAN) / STD) for s in (1, -1))
    exact = -np.log2(upper - lower).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, exact, atol=3e-3)
    other = fast_jit(lambda x, keys: flow_bits_of_levels(denoise, x, keys))(images, keys[::-1])
    assert np.abs(other - found).max() > 1e-5


def test_levels_are_those_the_network_knows():
    for precond in (ALL_LEVELS, DDPM(num_steps=40)):
        levels = flow_levels(precond)
        assert (np.diff(levels) > 0).all()
        np.testing.assert_array_equal(precond.round_sigma(levels), levels)
    assert len(levels) <= 40


def test_the_bound_needs_a_discrete_process_and_noise():
    images = np.zeros((1, 2, 2, 1), np.float32)
    for denoise in (ideal(EDM()), BoundDenoiser(ideal(DDPM()).function, DDPM())):
        with pytest.raises(UserError, match="--route=ode"):
            variational_bound(denoise, images, key=jax.random.key(0))
    with pytest.raises(UserError, match="draws noise"):
        variational_bound(ideal(DDPM(num_steps=5)), images)
