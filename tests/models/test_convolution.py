"""The convolution of the training step beside XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models import convolution
from lora_diffusion_jax.models.convolution import NHWC, conv_general_dilated

SAME = ((1, 1), (1, 1))
CHANNELS = convolution.MIN_CHANNELS
plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC)
ours = functools.partial(conv_general_dilated, dimension_numbers=NHWC)


def inputs(c_in: int, c_out: int, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, height, width, c_in))
    return x, jax.random.normal(keys[1], (3, 3, c_in, c_out))


def loss(conv, padding, x, kernel):
    return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), padding)))


@pytest.mark.parametrize(
    ("c_in", "c_out", "padding"),
    [
        (CHANNELS, CHANNELS, SAME),
        (CHANNELS, 2 * CHANNELS, ((0, 2), (3, 1))),  # rows, columns and sides differ
        (CHANNELS, CHANNELS - 1, SAME),  # too narrow
    ],
)
def test_value_and_gradient_are_xlas(c_in, c_out, padding):
    x, kernel = inputs(c_in, c_out, 5, 7)
    found, wanted = (
        jax.value_and_grad(functools.partial(loss, conv, padding), (0, 1))(x, kernel)
        for conv in (ours, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


def test_gradients_per_image():
    x, kernel = inputs(CHANNELS, CHANNELS, 4, 4)
    found, wanted = (
        jax.vmap(jax.grad(functools.partial(loss, conv, SAME), 1), (0, None))(x[:, None], kernel)
        for conv in (ours, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def lowered(conv, platform: str) -> str:
    x, kernel = inputs(CHANNELS, CHANNELS, 4, 4)
    gradient = jax.jit(jax.grad(functools.partial(loss, conv, SAME), (0, 1)))
    return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


def test_only_cpu_gets_matrix_products():
    assert lowered(ours, "cpu").count("stablehlo.dot_general") == 9
    for platform in ("cuda", "tpu"):
        found, wanted = lowered(ours, platform), lowered(plain, platform)
        assert "dot_general" not in found
        assert found.count("stablehlo.convolution") == wanted.count("stablehlo.convolution") == 3
