"""Group norm against flax and float64, on both ways to its moments."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models import norm
from lora_diffusion_jax.models.norm import GroupNorm

FLOAT32 = 2e-6  # a few roundings of numbers of order 1
WAYS = (norm.moments_in_one_pass, norm.moments_in_two_passes)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("channels", "groups", "epsilon"),
    [(8, 2, 1e-5), (12, 3, 1e-6), (64, 16, 1e-5), (256, 32, 1e-6)],
)
def test_group_norm_agrees_with_flax(channels: int, groups: int, epsilon: float) -> None:
    x = 3 * random(2, 6, 5, channels) + random(channels, seed=1)
    params = {"scale": random(channels, seed=2), "bias": random(channels, seed=3)}
    theirs = nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False)
    found = jax.jit(GroupNorm(epsilon).apply)({"params": params}, x)
    expected = jax.jit(theirs.apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * FLOAT32)


def test_group_norm_keeps_the_variance_of_values_far_from_zero() -> None:
    x = 1000 + random(1, 8, 8, 8)  # x^2 - mean^2 would lose every digit of the variance here
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    found = jax.jit(GroupNorm().apply)({"params": params}, x)
    groups = np.float64(x).reshape(1, 64, 2, 4)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=5e-4)  # the mean has 24 bits: 1000 * 2^-24 off


def test_group_norm_computes_in_float32_and_returns_its_dtype() -> None:
    x = 100 + random(1, 4, 4, 8)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    rounded = jnp.asarray(x, jnp.bfloat16)
    found = GroupNorm(dtype=jnp.bfloat16).apply({"params": params}, rounded)
    expected = GroupNorm().apply({"params": params}, rounded.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0, 1, 1000])
def test_moments_in_float64(way, offset) -> None:
    """On TPUs and GPUs in one pass. The error of a variance does not grow with the square of the mean."""
    x = offset * random(8, seed=1) + random(3, 6, 5, 8)
    added = random(3, 8, seed=2)
    found = jax.jit(way, static_argnums=0)(2, x, added)
    exact = np.float64(x)
    groups = (exact + added[:, None, None]).reshape(3, 30, 2, 4)
    over_group = lambda values: np.repeat(values.reshape(3, 2), 4, axis=1)  # noqa: E731
    expected = exact.mean((1, 2)), over_group(groups.mean((1, 3))), over_group(groups.var((1, 3)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=3e-6)


def test_one_pass_in_constant_channels() -> None:
    """No variance at all where there is nothing to round."""
    x = np.full((1, 4, 4, 8), 1e4, np.float32)
    x[..., 4:] *= np.linspace(1, 2, 16).reshape(4, 4, 1)
    _, _, variance = norm.moments_in_one_pass(2, x, np.zeros((1, 8), np.float32))
    assert variance[0, 0] == 0
    np.testing.assert_allclose(variance[0, 4:], np.float64(x[..., 4:]).var(), rtol=1e-6)


@pytest.mark.parametrize(("way", "tolerance"), zip(WAYS, (5e-5, 1e-6), strict=True))
def test_one_outlier(way, tolerance) -> None:
    """Also where it is the pixel that the others are counted from: a few digits, not all."""
    x = random(1, 8, 8, 4)
    x[:, 4, 4] = 300
    _, _, variance = way(1, x, np.zeros((1, 4), np.float32))
    np.testing.assert_allclose(variance[0, 0], np.float64(x).var(), rtol=tolerance)


def surrounded(x, added, scale, shift):
    """What stands around a norm in the blocks of the U-Nets, in flax's operations."""
    y = nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False).bind({"params": WEIGHTS})(
        x + added[:, None, None]
    )
    return y * (1 + scale[:, None, None]) + shift[:, None, None]


def in_one(x, added, scale, shift):
    parts = jnp.split(x, [3], axis=-1)
    return GroupNorm().apply({"params": WEIGHTS}, *parts, before=added, after=(scale, shift))


WEIGHTS = {"scale": random(8, seed=3), "bias": random(8, seed=4)}
ARGS = (5 + random(2, 4, 4, 8), *(random(2, 8, seed=s) for s in (5, 6, 7)))


@pytest.mark.parametrize("way", WAYS)
def test_value_and_derivatives_of_both_modes(monkeypatch, way) -> None:
    """Parts, the embedding, scale and shift; the gradient that is written out agrees with flax's."""
    monkeypatch.setattr(norm, "moments_in_two_passes", way)  # tests run on a CPU

    def loss(function):
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    ones = tuple(np.cos(a) for a in ARGS)
    (found, tangent), (expected, their_tangent) = (
        jax.jvp(f, ARGS, ones) for f in (in_one, surrounded)
    )
    np.testing.assert_allclose(found, expected, atol=5 * FLOAT32)
    np.testing.assert_allclose(tangent, their_tangent, atol=5e-5)  # of numbers up to 10
    every = tuple(range(len(ARGS)))
    for a, b in zip(*(jax.grad(loss(f), every)(*ARGS) for f in (in_one, surrounded)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_no_negative_variance() -> None:
    """Where all pixels but the one that they are counted from are equal, and far from it."""
    for size in range(1, 60):
        x = np.full((1, size, size, 4), 0.1, np.float32)
        x[:, size // 2, size // 2] = np.linspace(1e3, 1e4, 4)
        _, _, variance = norm.moments_in_one_pass(1, x, np.zeros((1, 4), np.float32))
        assert np.all(variance >= 0)
        np.testing.assert_allclose(variance[0], np.float64(x).var(), rtol=0.1)


@pytest.mark.parametrize(("platform", "one_pass"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_the_way_of_each_platform(platform, one_pass) -> None:
    """Chosen where the program is lowered. The batch may be left open."""
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 4, 4, 8), jnp.float32)
    apply = jax.jit(lambda x: GroupNorm().apply({"params": WEIGHTS}, x))
    text = jax.export.export(apply, platforms=[platform])(x).mlir_module()
    assert ("maximum" in text) == one_pass  # one pass takes differences, which rounding may turn
