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
from tests.diffusion.toy import MEAN, STD, ideal
from tests.small import fast_jit

DRAWS = stats.norm.ppf((np.arange(512) + 0.5) / 512)  # a normal distribution without chance
DRAWS /= DRAWS.std()


def exact_bits(images):
    """-log2 of the density N(MEAN, STD^2), the mean over each image."""
    return -stats.norm.logpdf(images, MEAN, STD).mean(axis=(1, 2, 3)) / np.log(2)


@pytest.mark.parametrize("precond", [DDPM(num_steps=50), DDPM("linear", 100)])
def test_the_bound_of_an_ideal_network_is_the_density(precond):
    """With the exact reverse process the bound is tight, but for the prior and the last step.

    Its last step stands for a gray level, the density times the level's width: equal as long as that is
    small against the least noise level, here a fifth. In processes of more steps it is not (0.05 bits
    at 4000 cosine steps). Noise of both signs and evenly spread leaves nothing to chance.
    """
    rng = np.random.default_rng(0)

    def spread():
        return rng.permutation(DRAWS)

    half = MEAN + STD * spread()
    images = np.concatenate([half, half]).reshape(2, 16, 32, 1).astype(np.float32)
    noise = np.stack([spread() for _ in range(precond.num_steps)])
    noise = np.concatenate([noise, -noise], axis=1).reshape(-1, *images.shape).astype(np.float32)
    prior, terms = fast_jit(lambda x: variational_bound(ideal(precond), x, noise=noise))(images)
    assert terms.shape == (2, precond.num_steps)
    bits = (prior + terms.sum(axis=1)).mean()
    assert abs(bits - (exact_bits(images).mean() - np.log2(LEVEL))) < 2e-4


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
