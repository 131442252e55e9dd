"""Training losses of EDM, VP and VE: lambda(sigma) (D(x + n; sigma) - x)^2 (EDM eq. 2 and table 1).

The draws are separate from the losses: `edm_sigma`, `vp_sigma`, `ve_sigma` give the noise levels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import Denoise, Images, Key


def edm_sigma(
    key: Key, batch: int, *, p_mean: float = -1.2, p_std: float = 1.2
) -> Float[Array, " B"]:
    """Noise levels with ln sigma ~ N(p_mean, p_std^2)."""
    return jnp.exp(p_mean + p_std * jax.random.normal(key, (batch,)))


def vp_sigma(
    key: Key, batch: int, *, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5
) -> Float[Array, " B"]:
    """sigma(t) of VP at t ~ U(epsilon_t, 1)."""
    t = 1 + jax.random.uniform(key, (batch,)) * (epsilon_t - 1)
    return jnp.sqrt(jnp.expm1(0.5 * beta_d * jnp.square(t) + beta_min * t))


def ve_sigma(
    key: Key, batch: int, *, sigma_min: float = 0.02, sigma_max: float = 100.0
) -> Float[Array, " B"]:
    """Noise levels whose logarithm is uniform between those of sigma_min and sigma_max."""
    return sigma_min * (sigma_max / sigma_min) ** jax.random.uniform(key, (batch,))


def iddpm_sigma(key: Key, batch: int, levels: Float[Array, " M"]) -> Float[Array, " B"]:
    """A level of iDDPM's grid for each image, all levels equally likely."""
    return jnp.asarray(levels)[jax.random.randint(key, (batch,), 0, len(levels))]


def weighted_loss(
    denoise: Denoise,
    images: Images,
    sigma: Float[Array, " B"],
    noise: Images,
    weight: Float[Array, " B"],
) -> Float[Array, "B H W C"]:
    """weight (D(images + sigma noise; sigma) - images)^2 per pixel, sigma and weight per image."""
    level = jnp.reshape(sigma, (-1, 1, 1, 1))
    error = denoise(images + level * noise, sigma) - images
    return jnp.reshape(weight, (-1, 1, 1, 1)) * jnp.square(error)


def edm_loss(
    denoise: Denoise,
    images: Images,
    sigma: Float[Array, " B"],
    noise: Images,
    *,
    sigma_data: float = 0.5,
) -> Float[Array, "B H W C"]:
    """EDM's loss per pixel, weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Args:
        denoise: D(x; sigma).
        images: clean images [B, H, W, C] in [-1, 1].
        sigma: noise levels [B], from `edm_sigma`.
        noise: unit normal noise of the images' shape.
        sigma_data: standard deviation of the data.
    """
    weight = (jnp.square(sigma) + sigma_data**2) / jnp.square(sigma * sigma_data)
    return weighted_loss(denoise, images, sigma, noise, weight)


def vp_loss(
    denoise: Denoise, images: Images, sigma: Float[Array, " B"], noise: Images
) -> Float[Array, "B H W C"]:
    """VP's loss per pixel, weight 1 / sigma^2; arguments as in `edm_loss`."""
    return weighted_loss(denoise, images, sigma, noise, 1 / jnp.square(sigma))


def ve_loss(
    denoise: Denoise, images: Images, sigma: Float[Array, " B"], noise: Images
) -> Float[Array, "B H W C"]:
    """VE's loss per pixel, weight 1 / sigma^2; arguments as in `edm_loss`."""
    return weighted_loss(denoise, images, sigma, noise, 1 / jnp.square(sigma))
