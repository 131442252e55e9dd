"""Guidance of formulas: linear denoisers, whose guided flow is known, and intervals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.diffusion.guidance import autoguidance, classifier_free
from lora_diffusion_jax.diffusion.precond import VE
from lora_diffusion_jax.diffusion.samplers import SAMPLERS, BoundDenoiser
from lora_diffusion_jax.errors import UserError
from tests.small import fast_jit


def gaussian(mean, std):
    """The ideal denoiser of N(mean, std^2)."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


STRONG, WEAK = gaussian(0.6, 0.5), gaussian(-0.1, 0.5)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(3, 2, 2, 1)).astype(np.float32)


@pytest.mark.parametrize("guide", [classifier_free, autoguidance])
def test_scale_1_is_the_network_itself_bit_for_bit(latents, guide):
    run = functools.partial(SAMPLERS["heun"], latents=latents, num_steps=6)
    np.testing.assert_array_equal(run(guide(STRONG, WEAK, 1.0)), run(STRONG))
    learned = BoundDenoiser(STRONG, VE(), raw=lambda x, sigma: (x, x))
    assert guide(learned, WEAK, 1.0).raw is learned.raw  # ddpm keeps the learned variances


@pytest.mark.parametrize("guide", [classifier_free, autoguidance])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guided_means_lie_on_a_line(latents, guide, scale):
    """Two Gaussians of one width: D' + w (D - D') is the ideal denoiser of the mean m' + w (m - m')."""
    mean = -0.1 + scale * (0.6 + 0.1)
    run = functools.partial(SAMPLERS["dpmpp_2m"], latents=latents, num_steps=20)
    expected = run(gaussian(mean, 0.5))
    np.testing.assert_allclose(run(guide(STRONG, WEAK, scale)), expected, atol=1e-5)


def test_the_interval_decides_which_levels_are_guided():
    guided = classifier_free(STRONG, WEAK, 2.0, interval=(0.5, 5.0))
    x = jnp.full((4, 1, 1, 1), 0.7)
    sigma = jnp.array([0.4, 0.6, 4.9, 5.1])
    w = np.array([1, 2, 2, 1]).reshape(4, 1, 1, 1)
    s = sigma[:, None, None, None]
    expected = WEAK(x, s) + w * (STRONG(x, s) - WEAK(x, s))

    def wide(denoise):  # takes sigma [B] as networks do
        return lambda x, sigma: denoise(x, sigma[:, None, None, None])

    rows = classifier_free(wide(STRONG), wide(WEAK), 2.0, interval=(0.5, 5.0))
    np.testing.assert_allclose(rows(x, sigma), expected, rtol=1e-6)
    for i in range(4):  # one level for all images, as in samplers
        np.testing.assert_allclose(guided(x, sigma[i])[i], expected[i], rtol=1e-6)


def test_outside_of_the_interval_the_guide_costs_nothing(latents):
    seen = []

    def spy(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma)
        return WEAK(x, sigma)

    guided = autoguidance(STRONG, spy, 2.0, interval=(0.1, 10.0))
    run = fast_jit(functools.partial(SAMPLERS["ipndm"], guided, num_steps=10))
    jax.block_until_ready(run(latents))
    jax.effects_barrier()
    grid = 80 ** (1 / 7) + np.arange(10) / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    inside = [s for s in grid**7 if 0.1 < s <= 10]
    np.testing.assert_allclose(sorted(seen, reverse=True), inside, rtol=1e-5)
    assert 2 < len(inside) < 8


def test_a_guided_denoiser_keeps_to_the_networks_levels(latents):
    guided = autoguidance(BoundDenoiser(STRONG, VE()), WEAK, 2.0)
    assert guided.precond == VE()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": np.nan}, "scale of guidance is nan"),
        ({"scale": np.inf}, "scale of guidance is inf"),
        ({"scale": 2.0, "interval": (5.0, 0.2)}, r"interval of guidance is \(5.0, 0.2\); expected"),
        ({"scale": 2.0, "interval": (1.0,)}, "expected two noise levels"),
        ({"scale": 2.0, "interval": (-1.0, 1.0)}, "expected two noise levels"),
        ({"scale": 2.0, "interval": (np.nan, 1.0)}, "expected two noise levels"),
    ],
)
def test_bad_settings_are_one_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        classifier_free(STRONG, WEAK, **settings)
