"""Training losses: lambda(sigma) (D(x + n; sigma) - x)^2 (Karras et al. 2022, eq. 2), and those of DDPM.

Draws are separate from losses, so that a loss can be replayed. `edm_loss`, `vp_loss` and `ve_loss` are
`weighted_loss` with the usual constants, called as edm_loss(denoise, images, sigma, noise).
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import Denoise, Images, Sigma
from lora_diffusion_jax.diffusion import discrete
from lora_diffusion_jax.diffusion.precond import DDPM, EDM, VE, VP, Precond
from lora_diffusion_jax.errors import UserError


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


def check_loss(precond: DDPM, learned: bool) -> None:
    """Raises UserError for the hybrid loss of a network whose variances are not learned."""
    if precond.loss == "hybrid" and not learned:
        raise UserError(
            "precond.loss=hybrid trains the variances of the reverse steps, which this network does not "
            "predict (model.learn_sigma=False); choose precond.loss=simple."
        )


def ddpm_loss(
    precond: DDPM,
    denoise: Callable[[Images, Sigma], tuple[Images, Array]],
    images: Images,
    sigma: Float[Array, " B"],
    noise: Images,
) -> Float[Array, "B H W C"]:
    """`precond.loss` per pixel, the sum of `ddpm_terms`."""
    return jax.tree.reduce(operator.add, ddpm_terms(precond, denoise, images, sigma, noise))


def ddpm_terms(
    precond: DDPM,
    denoise: Callable[[Images, Sigma], tuple[Images, Array]],
    images: Images,
    sigma: Float[Array, " B"],
    noise: Images,
) -> dict[str, Float[Array, "B H W C"]]:
    """`precond.loss` per pixel by its terms (Nichol & Dhariwal 2021, sections 2 and 3).

    simple: the squared error of the predicted noise. vlb: T times the term of the variational bound, in
    bits. hybrid: simple + T/1000 times that term (equation 16, with the T/1000 of the reference, where
    lambda is 1/1000), which trains the variances alone: the mean gets no gradient from it.

    Args:
        precond: gives the process and the loss.
        denoise: (x, sigma) -> (D, output of the network).
        images: gray levels of 8 bits in [-1, 1], [B, H, W, C].
        sigma: noise levels [B] of the process.
        noise: unit normal noise of the images' shape.

    Returns:
        {'mse', 'vb'} of the hybrid loss, {'loss'} of the others.

    Raises:
        UserError: hybrid for a network without variances.
    """
    channels = images.shape[-1]
    x = images + sigma.reshape(-1, 1, 1, 1) * noise
    denoised, raw = denoise(x, sigma)
    simple = jnp.square(noise - raw[..., :channels].astype(jnp.float32))
    if precond.loss == "simple":
        return {"loss": simple}
    if precond.loss == "hybrid":
        check_loss(precond, learned=raw.shape[-1] > channels)
        denoised = jax.lax.stop_gradient(denoised)
    process, t = precond.process, precond.nearest(sigma)
    noisy = discrete.at(process.sqrt_alphas_cumprod, t) * x
    log_variance = discrete.log_variance(process, t, raw, channels)
    term = discrete.bound_term(process, t, images, noisy, denoised, log_variance)
    if precond.loss == "vlb":
        return {"loss": len(process) * term}
    return {"mse": simple, "vb": len(process) / 1000 * term}


edm_loss = functools.partial(weighted_loss, EDM())
vp_loss = functools.partial(weighted_loss, VP())
ve_loss = functools.partial(weighted_loss, VE())
edm_sigma = EDM().draw_sigma  # (key, batch) -> noise levels [batch]
