"""A convolution for training, whose kernel gradient on CPU is a sum of matrix products."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NHWC = ("NHWC", "HWIO", "NHWC")
Padding = tuple[tuple[int, int], ...]
# XLA on CPU computes the kernel's gradient at 10 to 38 GFLOP/s a core, matrix products at 30 to 60. The
# products read the images once for each tap and pay off from this width on (benchmarks/convolution.py).
MIN_CHANNELS = 192


def conv_general_dilated(
    x: Float[Array, "B H W c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **rest: Any,
) -> Float[Array, "B H2 W2 c_out"]:
    """`jax.lax.conv_general_dilated`, on CPU with another gradient for wide kernels, equal up to rounding.

    Platforms other than CPU get the program that they would get without it. As a function with a
    gradient of its own it cannot be differentiated in forward mode. Takes what `nn.Conv` passes on.
    """
    if max(window_strides) > 1 or min(kernel.shape[2:]) < MIN_CHANNELS:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **rest)
    return _conv(tuple(padding), x, kernel)


def plain(padding: Padding, x: Array, kernel: Array) -> Array:
    """The convolution as XLA differentiates it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NHWC)


_conv = jax.custom_vjp(plain, nondiff_argnums=(0,))


def _forward(padding: Padding, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return plain(padding, x, kernel), (x, kernel)


def _backward(padding: Padding, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def by_xla(x: Array, g: Array) -> Array:
        return jax.linear_transpose(functools.partial(plain, padding, x), kernel)(g)[0]

    def by_products(x: Array, g: Array) -> Array:
        return kernel_gradient(x, g, kernel.shape, padding)

    (dx,) = jax.linear_transpose(lambda x: plain(padding, x, kernel), x)(g)
    return dx, jax.lax.platform_dependent(x, g, cpu=by_products, default=by_xla)


_conv.defvjp(_forward, _backward)


def kernel_gradient(x: Array, g: Array, shape: Sequence[int], padding: Padding) -> Array:
    """dk[i, j] = sum_bhw x[b, h + i - pad, w + j - pad] g[b, h, w]^T: a matrix product for each tap."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = g.shape[1:3]
    taps = [
        jnp.einsum("bhwc,bhwk->ck", x[:, i : i + height, j : j + width], g)
        for i in range(shape[0])
        for j in range(shape[1])
    ]
    return jnp.stack(taps).reshape(shape)
