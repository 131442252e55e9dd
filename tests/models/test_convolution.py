"""The convolutions of the U-Nets beside XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import host
from lora_diffusion_jax.models import convolution
from lora_diffusion_jax.models.convolution import NHWC, conv, conv_for_training

SAME = ((1, 1), (1, 1))
WIDE = convolution.MIN_CHANNELS
plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC)
sampling = functools.partial(conv, dimension_numbers=NHWC)
training = functools.partial(conv_for_training, dimension_numbers=NHWC)


def inputs(
    c_in: int, c_out: int, height: int, width: int, dtype: str = "float32"
) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, height, width, c_in), dtype)
    return x, jax.random.normal(keys[1], (3, 3, c_in, c_out), dtype) / (9 * c_in) ** 0.5


def loss(conv, padding, x, kernel):
    return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), padding)))


def is_plain(conv, x, kernel, strides=(1, 1), padding=SAME) -> bool:
    text = jax.jit(lambda x, k: conv(x, k, strides, padding)).lower(x, kernel).as_text()
    return text.count("stablehlo.convolution") == 1


SHAPES = [
    (WIDE, WIDE, 8, 5, SAME),
    (2 * WIDE, WIDE, 6, 4, ((0, 2), (3, 1))),  # sides differ, and the last tile ends outside
    (WIDE, 2 * WIDE, 6, 4, ((0, 2), (3, 1))),  # the same, with x narrower than the output
    (WIDE, 48, 3, 8, SAME),  # one tile, with a row outside
    (16, WIDE, 8, 8, SAME),  # too narrow
    (WIDE, WIDE, 5, 8, SAME),  # half of the second tile would be outside
]


@pytest.mark.parametrize(
    ("cores", "c_in", "c_out", "height", "width", "padding"),
    [*((2, *shape) for shape in SHAPES), (1, *SHAPES[1])],
)
def test_value_and_gradient_are_xlas(cores, c_in, c_out, height, width, padding, monkeypatch):
    """As near to float64 as a few roundings: XLA's own differ from it by some 4e-7 of the largest."""
    monkeypatch.setattr(host, "usable_cores", lambda: cores)
    x, kernel = inputs(c_in, c_out, height, width)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, kernel)]
        wanted = plain(*exact, (1, 1), padding)
        gradient = jax.grad(functools.partial(loss, plain, padding), (0, 1))(*exact)
    for found in (sampling, training):
        y = jax.jit(lambda x, k, f=found: f(x, k, (1, 1), padding))(x, kernel)
        np.testing.assert_allclose(y, wanted, atol=2e-6 * float(np.abs(wanted).max()))
        by_ours = jax.jit(jax.grad(functools.partial(loss, found, padding), (0, 1)))(x, kernel)
        for a, b in zip(by_ours, gradient, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6 * float(np.abs(b).max()))


@pytest.mark.parametrize(("cores", "kernel_shape"), [(1, "1x3x"), (2, "3x")])
def test_rows_are_convolved_in_the_dimensions_that_are_faster(cores, kernel_shape, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: cores)
    x, kernel = inputs(WIDE, WIDE, 8, 8)
    text = jax.jit(lambda x, k: sampling(x, k, (1, 1), SAME)).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 6
    assert text.count(f", tensor<{kernel_shape}{WIDE}x{WIDE}xf32>) ->") == 6


def test_exact_in_float64():
    """The algorithm itself makes no error: what float64 leaves is rounding."""
    with jax.enable_x64(True):
        x, kernel = inputs(WIDE, WIDE, 12, 6, "float64")
        found, wanted = (
            jax.value_and_grad(functools.partial(loss, f, SAME), (0, 1))(x, kernel)
            for f in (training, plain)
        )
    assert not is_plain(training, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13 * float(np.abs(b).max()))


def test_forward_mode():
    x, kernel = inputs(WIDE, WIDE, 4, 4)
    tangents = (jnp.cos(x), jnp.sin(kernel))
    found, wanted = (
        jax.jvp(functools.partial(loss, f, SAME), (x, kernel), tangents) for f in (sampling, plain)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_gradients_per_image():
    x, kernel = inputs(WIDE, WIDE, 4, 4)
    found, wanted = (
        jax.vmap(jax.grad(functools.partial(loss, f, SAME), 1), (0, None))(x[:, None], kernel)
        for f in (training, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_kinds_that_stay_xlas():
    x, kernel = inputs(WIDE, WIDE, 8, 8)
    assert not is_plain(sampling, x, kernel)
    assert is_plain(sampling, x, kernel, strides=(2, 2))
    assert is_plain(sampling, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert is_plain(sampling, x, kernel[:1], padding=((0, 0), (1, 1)))
    assert is_plain(sampling, x[..., :3], kernel[:, :, :3])


def lowered(f, platform: str) -> str:
    x, kernel = inputs(WIDE, WIDE, 4, 4)
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss, f, SAME), (0, 1)))
    return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("ours", [sampling, training])
def test_only_cpu_gets_other_products(ours):
    assert lowered(ours, "cpu").count("stablehlo.convolution") > 6
    if ours is training:  # a product for each of the six terms of the kernel's gradient
        assert lowered(ours, "cpu").count("stablehlo.dot_general") == 6
    for platform in ("cuda", "tpu"):
        found, wanted = lowered(ours, platform), lowered(plain, platform)
        assert "dot_general" not in found
        assert found.count("stablehlo.convolution") == wanted.count("stablehlo.convolution") == 3
