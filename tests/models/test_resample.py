"""Resampling against a convolution written out in NumPy, with zeros inserted for upsampling."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax.models.resample import downsample, upsample

FILTERS = [(1, 1), (1, 3, 3, 1), (1, 2), (1, 2, 4, 3)]  # the last two tell left from right
SIZES = [(4, 4), (6, 2), (8, 10)]
FLOAT32 = 1e-6  # values of order 1, up to 16 products each


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)


def window(taps: tuple[float, ...]) -> np.ndarray:
    return np.outer(taps, taps) / np.sum(taps) ** 2


def correlate(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """y[i, j] = sum_kl kernel[k, l] x[stride i + k, stride j + l], no padding, in float64."""
    size = len(kernel)
    rows = range(0, x.shape[1] - size + 1, stride)
    columns = range(0, x.shape[2] - size + 1, stride)
    out = np.zeros((x.shape[0], len(rows), len(columns), x.shape[3]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            patch = np.float64(x[:, row : row + size, column : column + size])
            out[:, i, j] = np.einsum("nklc,kl->nc", patch, kernel)
    return out


def pad(x: np.ndarray, amount: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (amount, amount), (amount, amount), (0, 0)))


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_downsample_is_a_strided_convolution(taps: tuple, size: tuple[int, int]) -> None:
    x = images(*size)
    expected = correlate(pad(x, (len(taps) - 1) // 2), window(taps), stride=2)
    found = jax.jit(lambda x: downsample(x, taps))(x)
    assert found.shape == (2, size[0] // 2, size[1] // 2, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("taps", FILTERS)
def test_downsample_without_padding(taps: tuple) -> None:
    x = images(8, 6)
    expected = correlate(x, window(taps), stride=2)
    found = jax.jit(lambda x: downsample(x, taps, pad=0))(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_upsample_is_a_convolution_of_the_image_with_zeros_inserted(
    taps: tuple, size: tuple[int, int]
) -> None:
    x = images(*size)
    spread = np.zeros((2, 2 * size[0] - 1, 2 * size[1] - 1, 3))
    spread[:, ::2, ::2] = x
    # The transpose of the strided convolution: the filter is mirrored, and keeps the mean (times 4).
    kernel = 4 * window(taps)[::-1, ::-1]
    expected = correlate(pad(spread, len(taps) - 1 - (len(taps) - 1) // 2), kernel, stride=1)
    found = jax.jit(lambda x: upsample(x, taps))(x)
    assert found.shape == (2, 2 * size[0], 2 * size[1], 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * FLOAT32)


def test_the_filter_of_ddpmpp_averages_and_repeats() -> None:
    x = images(4, 6)
    blocks = np.float64(x).reshape(2, 2, 2, 3, 2, 3)
    np.testing.assert_allclose(downsample(x), blocks.mean((2, 4)), rtol=0, atol=FLOAT32)
    np.testing.assert_array_equal(upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_constants_stay_what_they_are_away_from_the_border(taps: tuple) -> None:
    x = np.full((1, 12, 12, 1), 0.7, np.float32)
    for resample in (downsample, upsample):
        found = jax.jit(lambda x, resample=resample: resample(x, taps))(x)
        np.testing.assert_allclose(found[:, 2:-2, 2:-2], 0.7, rtol=1e-6)
