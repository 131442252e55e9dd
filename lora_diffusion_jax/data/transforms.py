"""What augmentation does to batches of images: flips, turns, shifts, affine warps, colour maps.

The warp is that of Karras et al. 2020, "Training Generative Adversarial Networks with Limited
Data", appendix B: reflect-pad, upsample by 2 with the 12-tap sym6 low-pass filter, sample
bilinearly at the transformed positions, downsample by 2 with the same filter. Every stage except
the bilinear one is a fixed matrix here, so shapes are static and no image depends on another.

The reference pads by what the batch's widest sample is estimated to need, at most size - 1 pixels;
here it is always size - 1. Given equal draws the results agree to 4e-6 (white noise: 4e-5), except
where its estimate is too small: there strongly shrunk samples read zeros close to the border, which
changed 3 in 100 batches of 64 white-noise images by more than 1e-4, at most by 9e-4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_diffusion_jax.array_types import Images

# Low-pass analysis filter of Daubechies' least asymmetric wavelet with six vanishing moments.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_TAPS = len(SYM6)
_EXACT = jax.lax.Precision.HIGHEST  # the defaults of TPU and TF32 keep 8 to 11 bits: errors of 4e-3

Affine = Float[Array, "B 2 3"]  # rows: x, y; columns: factors of x and y, then the offset
Planes = Float[Array, "B C V U"]


def flip(images: Images, flip_x: Array, flip_y: Array) -> Images:
    """Mirrors images [B, H, W, C] left-right where flip_x [B], and upside down where flip_y [B]."""
    images = _where(flip_x, images[:, :, ::-1], images)
    return _where(flip_y, images[:, ::-1], images)


def quarter_flips(turns: Array) -> tuple[Array, Array]:
    """The flips (x, y) [B] of `turns` quarter turns [B]; odd ones also need a transposition."""
    return (turns == 1) | (turns == 2), (turns == 2) | (turns == 3)


def rotate_quarters(images: Images, turns: Array) -> Images:
    """Rotates square images by `turns` [B] (0 to 3) quarter turns, counterclockwise."""
    images = flip(images, *quarter_flips(turns))
    return _where(turns % 2 == 1, jnp.swapaxes(images, 1, 2), images)


def shift(images: Images, right: Array, up: Array) -> Images:
    """Shifts by whole pixels [B] and fills up with the reflected image, as numpy.pad's "reflect".

    Any shift is possible: the reflection continues with period 2 * size - 2.
    """
    _, height, width, _ = images.shape

    def reflected(by: Array, size: int) -> Int[Array, "B size"]:
        position = jnp.arange(size, dtype=jnp.int32) + by[:, None].astype(jnp.int32)
        return size - 1 - jnp.abs(size - 1 - position % (2 * size - 2))

    rows, columns = reflected(up, height), reflected(-right, width)
    images = jnp.take_along_axis(images, rows[:, :, None, None], axis=1)
    return jnp.take_along_axis(images, columns[:, None, :, None], axis=2)


def inverse_affine(
    scale: Array, angle: Array, stretch: Array, axis: Array, right: Array, down: Array
) -> Affine:
    """The inverse of translate(right, down) * stretch * rotate(angle) * scale, for `warp`.

    It maps an output pixel to the input position that it shows. Written out, because matrix
    products of this size gain nothing and accelerators would round their factors.

    Args:
        scale: [B] > 0, factor on the size of the content.
        angle: [B] radians.
        stretch: [B] > 0, factor along one axis; 1 / stretch across it.
        axis: [B] radians, that axis from x towards -y.
        right: [B] pixels.
        down: [B] pixels.

    Returns:
        [B, 2, 3].
    """
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    # Rot(-axis) diag(1/stretch, stretch) Rot(axis), which is symmetric
    mean, half = (1 / stretch + stretch) / 2, (1 / stretch - stretch) / 2
    xx = mean + half * jnp.cos(2 * axis)
    xy = -half * jnp.sin(2 * axis)
    yy = mean - half * jnp.cos(2 * axis)
    linear = (
        (cos * xx - sin * xy, cos * xy - sin * yy),
        (sin * xx + cos * xy, sin * xy + cos * yy),
    )
    rows = [jnp.stack([a, b, -(a * right + b * down)], axis=-1) for a, b in linear]
    return jnp.stack(rows, axis=-2)


def _where(condition: Array, changed: Images, images: Images) -> Images:
    return jnp.where(condition[:, None, None, None], changed, images)


@functools.cache
def upsampling_matrix(size: int) -> Float[np.ndarray, "2*(3*size-2)+2 size"]:
    """Reflect-pads a line of `size` pixels by size - 1 on both sides and doubles its resolution.

    A single reflection reaches no further than size - 1, which is also the cap of the reference's
    padding. One row of zeros on either side stands for everything beyond. Row r is half-pixel
    position (r - 1) / 2 - (size - 1) of the line.
    """
    padded = 3 * size - 2
    distance = np.abs(np.arange(padded) - (size - 1))  # folded back at the left, then the right end
    source = size - 1 - np.abs(size - 1 - distance)
    reflect = np.eye(size)[source]  # [padded, size]
    tap = np.arange(2 * padded)[:, None] - 2 * np.arange(padded)[None, :] + 5
    inside = (tap >= 0) & (tap < _TAPS)
    interpolate = np.where(inside, np.asarray(SYM6)[np.clip(tap, 0, _TAPS - 1)], 0.0)
    return np.pad(interpolate @ reflect, ((1, 1), (0, 0))).astype(np.float32)


@functools.cache
def downsampling_matrix(size: int) -> Float[np.ndarray, "size 2*size+10"]:
    """Halves a line of 2 * size + 10 half-pixel samples: each output sees 12 of them."""
    rows = np.zeros([size, 2 * size + _TAPS - 2], np.float32)
    for i in range(size):
        rows[i, 2 * i : 2 * i + _TAPS] = SYM6
    return rows


def sample_positions(affine: Affine, height: int, width: int) -> tuple[Array, Array]:
    """Fractional rows of the upsampling matrices that the warp reads: y and x, each [B, V, U]."""

    def centred(size: int) -> Float[Array, " n"]:  # pixels from the middle of the output
        return (jnp.arange(2 * size + _TAPS - 2, dtype=jnp.float32) - (size + 4)) / 2

    def source(row: int, size: int) -> Float[Array, "B V U"]:
        a, b, c = (affine[:, row, k, None, None] for k in range(3))
        offset = a * centred(width)[None, None, :] + b * centred(height)[None, :, None] + c
        last = 2 * (3 * size - 2) + 1  # rows 0 and last are zero, as is everything beyond
        return jnp.clip(2 * offset + (3 * size - 2), 0, last)

    return source(1, height), source(0, width)


def _lower(position: Array, rows: int) -> tuple[Array, Array]:
    """Index of the row before each position (never the last row), and the weight of the next."""
    below = jnp.minimum(jnp.floor(position), rows - 2)
    return below.astype(jnp.int32), position - below


def sample_by_gather(images: Images, y: Array, x: Array) -> Planes:
    """Upsamples, then reads four neighbours per position; fast where indexing is cheap."""
    batch, height, width, channels = images.shape
    up_y, up_x = upsampling_matrix(height), upsampling_matrix(width)
    planes = jnp.moveaxis(images, -1, 1)
    up = jnp.einsum("vh,uw,bchw->bcvu", up_y, up_x, planes, precision=_EXACT)
    up = up.reshape(batch, channels, -1)  # flat, so that one index reads a pixel of all channels
    (row, fy), (column, fx) = _lower(y, len(up_y)), _lower(x, len(up_x))
    index = (row * len(up_x) + column).reshape(batch, -1)[:, None]

    def read(ahead: int) -> Planes:
        values = jnp.take_along_axis(up, index + ahead, axis=2, mode="clip")
        return values.reshape(batch, channels, *x.shape[1:])

    fy, fx = fy[:, None], fx[:, None]
    upper = (1 - fx) * read(0) + fx * read(1)
    lower = (1 - fx) * read(len(up_x)) + fx * read(len(up_x) + 1)
    return (1 - fy) * upper + fy * lower


def sample_by_products(images: Images, y: Array, x: Array) -> Planes:
    """The same by matrix products alone; fast on TPU, where indexing is slow.

    A half-pixel position reads each axis with two triangle weights, that is, a line of input
    pixels with weights triangle @ upsampling_matrix. XLA for TPU forms the triangles inside their
    product and sums over w as it writes the last one, so nothing large reaches memory.
    """

    def pixel_weights(position: Array, size: int) -> Float[Array, "B V U size"]:
        up = upsampling_matrix(size)
        rows = jnp.arange(len(up), dtype=jnp.float32)
        triangle = jax.nn.relu(1 - jnp.abs(position[..., None] - rows))
        return jnp.einsum("bvur,rs->bvus", triangle, up, precision=_EXACT)

    _, height, width, _ = images.shape
    columns = pixel_weights(x, width)
    lines = jnp.einsum("bvuh,bhwc->bvuwc", pixel_weights(y, height), images, precision=_EXACT)
    return jnp.einsum("bvuwc,bvuw->bcvu", lines, columns, precision=_EXACT)


def warp(images: Images, affine: Affine) -> Images:
    """Moves the content of each image: output pixel q shows the input at affine(q).

    Args:
        images: [B, H, W, C], H and W at least 2.
        affine: [B, 2, 3], the inverse transformation, in pixels from the image's middle, x to
            the right and y down.

    Returns:
        [B, H, W, C]. Around the image lies its reflection, H - 1 (W - 1) pixels wide, and 0 beyond.
    """
    _, height, width, _ = images.shape
    y, x = sample_positions(affine, height, width)
    half_pixels = jax.lax.platform_dependent(
        images, y, x, tpu=sample_by_products, default=sample_by_gather
    )
    down_y, down_x = downsampling_matrix(height), downsampling_matrix(width)
    rows = jnp.einsum("wu,bcvu->bcvw", down_x, half_pixels, precision=_EXACT)
    return jnp.moveaxis(jnp.einsum("hv,bcvw->bchw", down_y, rows, precision=_EXACT), 1, -1)


def recolour(images: Images, matrix: Float[Array, "B 3 4"]) -> Images:
    """Applies an affine map of RGB; gray images get the mean of the channels it gives."""
    if images.shape[-1] == 1:  # a gray image is R = G = B
        mean = matrix.mean(axis=1)  # [B, 4]
        gain, offset = mean[:, :3].sum(axis=-1), mean[:, 3]
        return images * gain[:, None, None, None] + offset[:, None, None, None]
    mixed = jnp.einsum("bhwc,bdc->bhwd", images, matrix[:, :, :3], precision=_EXACT)
    return mixed + matrix[:, None, None, :, 3]
