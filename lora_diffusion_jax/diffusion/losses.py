"""Training losses: lambda(sigma) (D(x + n; sigma) - x)^2 (Karras et al. 2022, eq. 2).

Noise levels and weights belong to the preconditioning (`precond`); the functions named after one take
its usual constants. Draws are separate from losses, so a loss can be replayed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import Denoise, Images, Key
from lora_diffusion_jax.diffusion.precond import EDM, VE, VP


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


def edm_sigma(
    key: Key, batch: int, *, p_mean: float = -1.2, p_std: float = 1.2
) -> Float[Array, " B"]:
    """Noise levels with ln sigma ~ N(p_mean, p_std^2)."""
    return EDM(p_mean=p_mean, p_std=p_std).draw_sigma(key, batch)


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
    return weighted_loss(denoise, images, sigma, noise, EDM(sigma_data).weight(sigma))


def vp_loss(
    denoise: Denoise, images: Images, sigma: Float[Array, " B"], noise: Images
) -> Float[Array, "B H W C"]:
    """VP's loss per pixel, weight 1 / sigma^2; arguments as in `edm_loss`."""
    return weighted_loss(denoise, images, sigma, noise, VP().weight(sigma))


def ve_loss(
    denoise: Denoise, images: Images, sigma: Float[Array, " B"], noise: Images
) -> Float[Array, "B H W C"]:
    """VE's loss per pixel, weight 1 / sigma^2; arguments as in `edm_loss`."""
    return weighted_loss(denoise, images, sigma, noise, VE().weight(sigma))
