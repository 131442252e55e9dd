"""Training losses: lambda(sigma) (D(x + n; sigma) - x)^2 (Karras et al. 2022, eq. 2).

Draws are separate from losses, so that a loss can be replayed. `edm_loss`, `vp_loss` and `ve_loss` are
`weighted_loss` with the usual constants, called as edm_loss(denoise, images, sigma, noise).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import Denoise, Images
from lora_diffusion_jax.diffusion.precond import EDM, VE, VP, Precond


def weighted_loss(
    precond: Precond, denoise: Denoise, images: Images, sigma: Float[Array, " B"], noise: Images
) -> Float[Array, "B H W C"]:
    """lambda(sigma) (D(images + sigma noise; sigma) - images)^2 per pixel.

    Args:
        precond: gives the weight lambda.
        denoise: D(x; sigma).
        images: clean images [B, H, W, C] in [-1, 1].
        sigma: noise levels [B], from `precond.draw_sigma`.
        noise: unit normal noise of the images' shape.
    """
    level, weight = (jnp.reshape(v, (-1, 1, 1, 1)) for v in (sigma, precond.weight(sigma)))
    return weight * jnp.square(denoise(images + level * noise, sigma) - images)


edm_loss = functools.partial(weighted_loss, EDM())
vp_loss = functools.partial(weighted_loss, VP())
ve_loss = functools.partial(weighted_loss, VE())
edm_sigma = EDM().draw_sigma  # (key, batch) -> noise levels [batch]
