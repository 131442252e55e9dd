"""Resizing as in published numbers: each convention is a matrix [new size, size] per axis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.evaluation.inception_network import SIDE

BICUBIC_SIDE = 224  # of the image that DINOv2 sees


def resized(images: jax.Array, weights: Callable[[int], np.ndarray]) -> jax.Array:
    """Returns float32 [B, side, side, 3] in 0..255 of uint8 images; gray becomes three channels."""
    rows, columns = (weights(side) for side in images.shape[1:3])
    x = jnp.einsum("yh,bhwc,xw->byxc", rows, images.astype(jnp.float32), columns)
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def tf1_weights(size: int) -> np.ndarray:
    """Returns TF1's bilinear resize as a matrix [299, size]: source = target * size / 299."""
    return _bilinear(np.arange(SIDE) * (size / SIDE), size)


def half_pixel_weights(size: int) -> np.ndarray:
    """Returns half-pixel bilinear resize as [299, size]: source = (target + 1/2) size/299 - 1/2."""
    return _bilinear((np.arange(SIDE) + 0.5) * (size / SIDE) - 0.5, size)


def _bilinear(source: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation between the two neighbours; beyond the edge the edge itself."""
    source = np.clip(source, 0, size - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, size - 1)
    rows, weights = np.arange(SIDE), np.zeros((SIDE, size))
    np.add.at(weights, (rows, low), 1 - (source - low))
    np.add.at(weights, (rows, high), source - low)
    return weights.astype(np.float32)


def bicubic_weights(size: int) -> np.ndarray:
    """Returns the antialiased bicubic resize (Keys, a = -1/2) as [224, size]."""
    scale = size / BICUBIC_SIDE
    reach = max(scale, 1.0)  # the kernel widens when the image shrinks
    centres = (np.arange(BICUBIC_SIDE) + 0.5) * scale - 0.5
    weights = keys_kernel((np.arange(size) - centres[:, None]) / reach, -0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) with slope parameter a."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


PREPROCESS = {
    # StyleGAN and EDM: TF1's bilinear resize.
    "edm": lambda images: (resized(images, tf1_weights) - 128.0) / 128.0,
    # pytorch-fid: half-pixel bilinear without antialias.
    "pytorch-fid": lambda images: resized(images, half_pixel_weights) / 127.5 - 1.0,
}
