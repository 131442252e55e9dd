"""From uint8 images to what Inception sees: the two resizing conventions of published numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.evaluation.inception_network import SIDE


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


def _resized(images: jax.Array, weights: Callable[[int], np.ndarray]) -> jax.Array:
    """Returns float32 [B, 299, 299, 3] in 0..255; gray becomes three equal channels."""
    x = images.astype(jnp.float32)
    rows, columns = (weights(side) for side in images.shape[1:3])
    x = jnp.einsum("yh,bhwc,xw->byxc", rows, x, columns)
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def prepare_edm(images: jax.Array) -> jax.Array:
    """The detector of StyleGAN and EDM: TF1 bilinear, then (x - 128) / 128."""
    return (_resized(images, tf1_weights) - 128.0) / 128.0


def prepare_pytorch_fid(images: jax.Array) -> jax.Array:
    """The detector of pytorch-fid: half-pixel bilinear without antialias, then x / 127.5 - 1."""
    return _resized(images, half_pixel_weights) / 127.5 - 1.0


PREPROCESS = {"edm": prepare_edm, "pytorch-fid": prepare_pytorch_fid}
