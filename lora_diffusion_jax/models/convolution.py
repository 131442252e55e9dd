"""3x3 convolutions that on CPU compute half the products: Winograd's algorithm along the height."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax import host

NHWC = ("NHWC", "HWIO", "NHWC")
NWC = ("NWC", "WIO", "NWC")
Padding = tuple[tuple[int, int], ...]
# From this width on it pays off (benchmarks/convolution.py).
MIN_CHANNELS = 32

# F(4, 3) of Winograd (1980): four outputs of a filter of three taps from six products. Polynomials
# are evaluated at 0, +-A, +-B and infinity, and interpolated. Points near 1 keep the error of float32
# at some twice that of the sum itself; the usual 1 and 2 have four times.
TILE, TAPS = 4, 3
A, B = 3 / 4, 3 / 2
ROWS = np.array(  # six rows of the input -> six terms
    [
        [A**2 * B**2, 0, -(A**2) - B**2, 0, 1, 0],
        [0, -A * B**2, -(B**2), A, 1, 0],
        [0, A * B**2, -(B**2), -A, 1, 0],
        [0, -B * A**2, -(A**2), B, 1, 0],
        [0, B * A**2, -(A**2), -B, 1, 0],
        [0, A**2 * B**2, 0, -(A**2) - B**2, 0, 1],
    ]
)
OUTPUT = np.array(  # six products -> four rows of the output
    [
        [1, 1, 1, 1, 1, 0],
        [0, A, -A, B, -B, 0],
        [0, A**2, A**2, B**2, B**2, 0],
        [0, A**3, -(A**3), B**3, -(B**3), 1],
    ]
)
FILTER = np.array(  # three taps -> six
    [
        [1 / (A**2 * B**2), 0, 0],
        *([w, w * p, w * p**2] for p, w in ((s * A, 0.5 / (A**4 - A**2 * B**2)) for s in (1, -1))),
        *([w, w * p, w * p**2] for p, w in ((s * B, 0.5 / (B**4 - A**2 * B**2)) for s in (1, -1))),
        [0, 0, 1],
    ]
)


def conv_for_training(
    x: Float[Array, "B H W c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **rest: Any,
) -> Float[Array, "B H2 W2 c_out"]:
    """`jax.lax.conv_general_dilated`, on CPU by other means, equal up to rounding.

    Platforms other than CPU get the program that they would get without it. As a function with a
    gradient of its own it cannot be differentiated in forward mode. Takes what `nn.Conv` passes on.
    """
    if not pays_off(x, kernel, window_strides, padding):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **rest)
    return _trained(tuple(padding), x, kernel)


def conv(
    x: Float[Array, "B H W c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **rest: Any,
) -> Float[Array, "B H2 W2 c_out"]:
    """As `conv_for_training`, with derivatives in both modes, which are XLA's."""
    if not pays_off(x, kernel, window_strides, padding):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **rest)
    return _sampled(tuple(padding), x, kernel)


def pays_off(
    x: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> bool:
    """Whether a convolution is of the kind that is faster on CPU by the products of `winograd`."""
    height = x.shape[1] + sum(padding[0]) - TAPS + 1
    return (
        kernel.shape[0] == TAPS
        and max(strides) == 1
        and min(kernel.shape[2:]) >= MIN_CHANNELS
        and x.dtype == kernel.dtype
        and jnp.finfo(x.dtype).bits >= 32  # sums of rows would lose what little bfloat16 has
        and height >= 0.7 * TILE * -(-height // TILE)  # the last tile is not mostly padding
    )


def plain(padding: Padding, x: Array, kernel: Array) -> Array:
    """The convolution as XLA computes and differentiates it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NHWC)


def _chosen(padding: Padding, x: Array, kernel: Array) -> Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(winograd, padding),
        default=functools.partial(plain, padding),
    )


_sampled = jax.custom_jvp(_chosen, nondiff_argnums=(0,))


@_sampled.defjvp
def _tangent(
    padding: Padding, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    x, kernel = primals
    by_both = plain(padding, tangents[0], kernel) + plain(padding, x, tangents[1])
    return _sampled(padding, x, kernel), by_both


_trained = jax.custom_vjp(_chosen, nondiff_argnums=(0,))


def _forward(padding: Padding, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _chosen(padding, x, kernel), (x, kernel)


def _backward(padding: Padding, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def by_xla(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        (dx,) = jax.linear_transpose(lambda x: plain(padding, x, kernel), x)(g)
        (dk,) = jax.linear_transpose(functools.partial(plain, padding, x), kernel)(g)
        return dx, dk

    def by_products(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        kh, kw = kernel.shape[:2]
        (top, bottom), (left, right) = padding
        around = ((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right))
        dx = winograd(around, g, kernel[::-1, ::-1].swapaxes(2, 3))
        return dx, kernel_gradient(x, g, kernel.shape, padding)

    return jax.lax.platform_dependent(x, kernel, g, cpu=by_products, default=by_xla)


_trained.defvjp(_forward, _backward)


def winograd(
    padding: Padding, x: Float[Array, "B H W c_in"], kernel: Float[Array, "3 kw c_in c_out"]
) -> Float[Array, "B H2 W2 c_out"]:
    """The convolution from six ones of a kernel of one row, each on a quarter of the rows."""
    height = x.shape[1] + sum(padding[0]) - TAPS + 1
    filters = _combine(FILTER, list(kernel))  # six of [kw, c_in, c_out]
    terms = [
        _along_rows(rows, row, padding[1])
        for rows, row in zip(_terms(x, padding[0], height), filters, strict=True)
    ]
    out = jnp.stack(_combine(OUTPUT, terms), axis=2)  # [B, tiles, TILE, W2, c_out]
    return out.reshape(x.shape[0], -1, *out.shape[3:])[:, :height]


def _along_rows(
    x: Float[Array, "B H W c_in"], kernel: Float[Array, "kw c_in c_out"], padding: tuple[int, int]
) -> Float[Array, "B H W2 c_out"]:
    """Each row convolved by itself, in one dimension where there are several cores.

    XLA for CPUs runs convolutions in two dimensions on one core only; with one core, they are some 15 %
    faster than those in one dimension. So it was measured with jaxlib 0.10.2, whose convolutions in one
    dimension read outside the array where padding is negative.
    """
    if host.usable_cores() == 1:
        return plain(((0, 0), padding), x, kernel[None])
    left, right = padding
    cut = (min(0, left), min(0, right), 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), cut, (0, 0, 0)])
    rows = x.reshape(-1, *x.shape[2:])
    around = ((max(0, left), max(0, right)),)
    out = jax.lax.conv_general_dilated(rows, kernel, (1,), around, dimension_numbers=NWC)
    return out.reshape(*x.shape[:2], *out.shape[1:])


def kernel_gradient(
    x: Float[Array, "B H W c_in"],
    g: Float[Array, "B H2 W2 c_out"],
    shape: Sequence[int],
    padding: Padding,
) -> Float[Array, "3 kw c_in c_out"]:
    """dk[i, j] = sum_bhw x[b, h + i - pad, w + j - pad] g[b, h, w]^T, as the transpose of `winograd`.

    Each of its six terms is one matrix product, with all taps of a row beside one another: the narrower
    of x and g is shifted. The rows of x are those of `winograd`, which XLA then keeps.
    """
    _, kw, c_in, c_out = shape
    (left, right), height = padding[1], g.shape[1]
    shift_g = c_in >= c_out
    sums = []
    for rows, term in zip(
        _terms(x, padding[0], height),
        _combine(OUTPUT.T, _tiled(g, (0, 0), height)),
        strict=True,
    ):
        if shift_g:
            term = _beside(term, (kw - 1 - left, kw - 1 - right), range(kw)[::-1], x.shape[2])
        else:
            rows = _beside(rows, (left, right), range(kw), g.shape[2])
        # Of two dimensions each: XLA on CPU transposes products over several.
        rows, term = rows.reshape(-1, rows.shape[-1]), term.reshape(-1, term.shape[-1])
        # It also transposes the first operand, which should be the narrower one.
        sums.append(jnp.einsum("tc,tk->ck" if shift_g else "tc,tk->kc", rows, term))
    taps = jnp.stack(_combine(FILTER.T, sums))
    if shift_g:  # [3, c_in, kw c_out]
        return jnp.moveaxis(taps.reshape(TAPS, c_in, kw, c_out), 2, 1)
    return jnp.moveaxis(taps, 1, 2).reshape(shape)  # of [3, c_out, kw c_in]


def _beside(
    x: Float[Array, "B H W C"], padding: tuple[int, int], starts: Sequence[int], width: int
) -> Float[Array, "B H width n*C"]:
    """Pieces of `width` columns of x, padded with zeros, with their channels beside one another.

    Columns are left out where the padding is negative.
    """
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), (*padding, 0), (0, 0, 0)])
    return jnp.concatenate([x[:, :, start : start + width] for start in starts], axis=-1)


def _terms(x: Array, padding: tuple[int, int], height: int) -> list[Array]:
    """Six combinations of the rows that an output of `height` rows sees, [B, tiles, W, C] each."""
    return _combine(ROWS, _tiled(x, padding, height, TAPS - 1))


def _tiled(x: Array, padding: tuple[int, int], height: int, more: int = 0) -> list[Array]:
    """Rows i, i + TILE, ... for each i < TILE + more, [B, tiles, W, C] each; zeros outside."""
    tiles = -(-height // TILE)
    whole = TILE * (tiles + -(-more // TILE))
    x = jnp.pad(x, ((0, 0), (padding[0], whole - x.shape[1] - padding[0]), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, TILE, *x.shape[2:])
    return [x[:, i // TILE : i // TILE + tiles, i % TILE] for i in range(TILE + more)]


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """The matrix times a vector of arrays; factors of 0 and 1 cost nothing."""

    def scaled(factor: float, part: Array) -> Array:
        return part if factor == 1 else float(factor) * part

    add: Callable[[Array, Array], Array] = jnp.add
    return [
        functools.reduce(add, [scaled(f, p) for f, p in zip(row, parts, strict=True) if f])
        for row in matrix
    ]
