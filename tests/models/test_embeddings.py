"""Embeddings of the noise level against their closed forms."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax.models.embeddings import FourierEmbedding, positional_embedding, swap_halves

LEVELS = np.float32([-1.5, 0.0, 0.3, 1.1])


@pytest.mark.parametrize("endpoint", [True, False])
@pytest.mark.parametrize("channels", [4, 32])
def test_positional_embedding_has_its_closed_form(channels: int, endpoint: bool) -> None:
    half = channels // 2
    found = jax.jit(lambda t: positional_embedding(t, channels, endpoint=endpoint))(LEVELS)
    for i in range(half):
        frequency = 10000.0 ** -(i / (half - 1 if endpoint else half))
        np.testing.assert_allclose(found[:, i], np.cos(LEVELS * frequency), atol=5e-7)
        np.testing.assert_allclose(found[:, half + i], np.sin(LEVELS * frequency), atol=5e-7)


def test_frequencies_span_the_range_of_positions() -> None:
    tiny = np.float32([1e-3])  # sin(t f) / t = f
    for endpoint, last in ((True, 1e-4), (False, 10000 ** (-15 / 16))):
        frequencies = positional_embedding(tiny, 32, endpoint=endpoint)[0, 16:] / 1e-3
        np.testing.assert_allclose([frequencies[0], frequencies[-1]], [1, last], rtol=1e-5)


def test_positions_of_a_thousand_keep_their_phase() -> None:
    t = np.float32([999.0])  # VP and iDDPM count to 999: float32 leaves 3e-5 of a phase
    found = positional_embedding(t, 16)
    phase = 999.0 * 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(found[0], np.r_[np.cos(phase), np.sin(phase)], atol=1e-4)


def test_fourier_embedding_has_its_closed_form_and_fixed_frequencies() -> None:
    module = FourierEmbedding(8192)
    variables = module.init(jax.random.key(0), LEVELS)
    assert set(variables) == {"buffers"}
    frequencies = np.asarray(variables["buffers"]["freqs"], np.float64)
    assert frequencies.std() == pytest.approx(16, rel=0.05)  # 4,096 draws: 1.1 %
    found = module.apply(variables, LEVELS)
    phase = 2 * np.pi * LEVELS[:, None] * frequencies
    expected = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # phases of several hundred in float32


def test_swap_halves_puts_the_sines_first() -> None:
    found = swap_halves(np.arange(6.0).reshape(1, 6))
    np.testing.assert_array_equal(found, [[3, 4, 5, 0, 1, 2]])
