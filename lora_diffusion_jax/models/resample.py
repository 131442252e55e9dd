"""Up- and downsampling by two with a separable FIR filter (Karras et al. 2022, NCSN++ and DDPM++)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _normalised(taps: Sequence[float]) -> np.ndarray:
    taps = np.asarray(taps, np.float64)
    return taps / taps.sum()


def _downsample_axis(x: Array, taps: np.ndarray, axis: int, pad: int) -> Array:
    """y[i] = sum_k taps[k] x[2 i + k - pad] along one axis, zeros outside."""
    x = jnp.moveaxis(x, axis, 0)
    padded = jnp.pad(x, [(pad, pad)] + [(0, 0)] * (x.ndim - 1))
    size = (padded.shape[0] - len(taps)) // 2 + 1
    out = sum(float(t) * padded[k : k + 2 * size - 1 : 2] for k, t in enumerate(taps))
    return jnp.moveaxis(out, 0, axis)


def _upsample_axis(x: Array, taps: np.ndarray, axis: int, pad: int) -> Array:
    """y[o] = 2 sum_i taps[o + pad - 2 i] x[i] along one axis: each output phase on its own."""
    x = jnp.moveaxis(x, axis, 0)
    size = x.shape[0]
    reach = len(taps)
    padded = jnp.pad(x, [(reach, reach)] + [(0, 0)] * (x.ndim - 1))
    phases = []
    for phase in (0, 1):
        terms = []
        for k in range((phase + pad) % 2, reach, 2):  # the other taps meet the zeros between pixels
            shift = (phase + pad - k) // 2  # i = o // 2 + shift
            terms.append(2 * float(taps[k]) * padded[reach + shift : reach + shift + size])
        phases.append(sum(terms))
    out = jnp.stack(phases, axis=1).reshape(2 * size, *x.shape[1:])  # row o = 2 i + phase
    return jnp.moveaxis(out, 0, axis)


def downsample(
    x: Float[Array, "B H W C"], taps: Sequence[float] = (1, 1), *, pad: int | None = None
) -> Float[Array, "B H2 W2 C"]:
    """Filters and keeps every second pixel; [1, 1] is the mean of 2x2 blocks.

    Args:
        x: images.
        taps: the filter along each axis, normalised here to sum 1.
        pad: zeros on each side; the default (len(taps) - 1) // 2 halves an even size exactly.
    """
    taps = _normalised(taps)
    pad = (len(taps) - 1) // 2 if pad is None else pad
    batch, height, width, channels = x.shape
    if len(taps) == 2 and pad == 0 and height % 2 == 0 and width % 2 == 0 and taps[0] == taps[1]:
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return _downsample_axis(_downsample_axis(x, taps, 1, pad), taps, 2, pad)


def upsample(
    x: Float[Array, "B H W C"], taps: Sequence[float] = (1, 1)
) -> Float[Array, "B 2*H 2*W C"]:
    """Doubles the size; [1, 1] repeats each pixel, [1, 3, 3, 1] interpolates linearly."""
    taps = _normalised(taps)
    if len(taps) == 2 and taps[0] == taps[1]:
        batch, height, width, channels = x.shape
        wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return wide.reshape(batch, 2 * height, 2 * width, channels)
    pad = (len(taps) - 1) // 2
    return _upsample_axis(_upsample_axis(x, taps, 1, pad), taps, 2, pad)
