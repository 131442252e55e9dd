"""Likelihoods in bits per dimension: the variational bound of a discrete process, and the flow's density."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import Denoise, Images, Key
from lora_diffusion_jax.diffusion import discrete, schedules
from lora_diffusion_jax.diffusion.precond import DDPM, Precond
from lora_diffusion_jax.diffusion.samplers.plan import BoundDenoiser, noise_source, precond_of
from lora_diffusion_jax.errors import UserError

LEVEL = 2 * discrete.BIN  # distance between two gray levels in [-1, 1]


def variational_bound(
    denoise: BoundDenoiser,
    images: Images,
    *,
    respacing: str = "",
    clip_denoised: bool = True,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> tuple[Float[Array, " B"], Float[Array, "B K"]]:
    """The bound -log2 p(x_0) <= prior + sum of terms, with one draw of the noise for each term.

    Args:
        denoise: of `bind`, for a network of a discrete process.
        images: gray levels of 8 bits in [-1, 1], [B, H, W, C].
        respacing: the steps of the process (`discrete.space_timesteps`); "" has all.
        clip_denoised: the predictions of the clean image are clipped to [-1, 1].
        key: one key, or one per image [B]; term i draws its noise with fold_in(key, i).
        noise: unit normal noise [K, B, H, W, C] to use instead.

    Returns:
        The prior's term [B] and the others [B, K], from the last timestep to the first, in bits per
        dimension.

    Raises:
        UserError: the network has no discrete process, or there is neither key nor noise.
    """
    precond = precond_of(denoise)
    raw_of = getattr(denoise, "raw", None)
    if not isinstance(precond, DDPM) or raw_of is None:
        raise UserError(
            "The variational bound needs a network of a discrete process (precond.name=ddpm), bound "
            "with samplers.bind; --route=ode takes any network."
        )
    process = precond.process.respace(respacing)
    last = len(process) - 1
    draw = noise_source("The bound", key, noise, (len(process), *images.shape))
    levels = jnp.asarray(process.sigmas, jnp.float32)
    scales = jnp.asarray(process.sqrt_alphas_cumprod, jnp.float32)

    def term(step: jax.Array) -> Float[Array, " B"]:
        t = last - step
        x = images + levels[t] * draw(step)
        denoised, raw = raw_of(x, levels[t])
        if clip_denoised:
            denoised = jnp.clip(denoised, -1, 1)
        log_variance = discrete.log_variance(process, t, raw, images.shape[-1])
        bits = discrete.bound_term(process, t, images, scales[t] * x, denoised, log_variance)
        return bits.mean(axis=(1, 2, 3))

    terms = jax.lax.map(term, jnp.arange(len(process)))
    return discrete.prior_bits(process, images), terms.T


def flow_levels(
    precond: Precond, num_steps: int = 256, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """The noise levels of `flow_bits`, ascending: a geometric grid of those that the network knows."""
    grid = schedules.ve_grid(num_steps + 1, *precond.clip(sigma_min, sigma_max))
    return np.unique(precond.round_sigma(grid))


def flow_bits(
    denoise: Denoise,
    images: Images,
    probe: Images,
    sigmas: np.ndarray | None = None,
) -> Float[Array, " B"]:
    """-log2 of the probability flow's density at images, per dimension, [B].

    Along dx/dsigma = (x - D(x; sigma)) / sigma from the least to the largest level (Song et al. 2021, section
    4.3; Karras et al. 2022, equation 3),

        ln p(x) = ln N(x_max; 0, sigma_max^2) + n ln(sigma_max / sigma_min) - integral of tr(dD/dx) d ln sigma

    for n dimensions. Heun's method visits the levels alone, which may be those of a discrete process; the
    trapezoidal rule adds up the trace, which one probe e estimates as e^T (dD/dx) e (Hutchinson). 256 steps
    are 3e-4 bits per dimension off for Gaussian data. The normal density at the end has mean 0.

    Args:
        denoise: D(x; sigma).
        images: [B, H, W, C], dequantised.
        probe: e, entries +-1 at random, of the images' shape.
        sigmas: noise levels [N + 1], ascending, for 2 N evaluations with their derivatives; None: of
            `flow_levels`.
    """
    sigmas = flow_levels(precond_of(denoise)) if sigmas is None else sigmas
    size = images[0].size

    def slope(x: Images, sigma: jax.Array) -> tuple[Images, Float[Array, " B"]]:
        denoised, moved = jax.jvp(lambda x: denoise(x, sigma), (x,), (probe,))
        return (x - denoised) / sigma, jnp.sum(probe * moved, axis=(1, 2, 3)) / size

    def step(carry: tuple, row: tuple) -> tuple[tuple, None]:
        x, integral = carry
        sigma, sigma_next, h, log_ratio = row
        d, trace = slope(x, sigma)
        d_next, trace_next = slope(x + h * d, sigma_next)
        x = x + h * (d + d_next) / 2
        return (x, integral + log_ratio * (trace + trace_next) / 2), None

    rows = [(a, b, b - a, np.log(b / a)) for a, b in pairwise(sigmas)]
    table = jnp.asarray(rows, jnp.float32).T
    start = (jnp.asarray(images, jnp.float32), jnp.zeros(len(images)))
    (x, integral), _ = jax.lax.scan(step, start, tuple(table))
    energy = jnp.mean(jnp.square(x / np.float32(sigmas[-1])), axis=(1, 2, 3)) / 2
    # ln sigma_max of the normal density and of the range cancel.
    nats = energy + 0.5 * np.log(2 * np.pi) + np.log(sigmas[0]) + integral
    return nats / np.log(2)


def flow_bits_of_levels(
    denoise: Denoise, images: Images, keys: Key, sigmas: np.ndarray | None = None
) -> Float[Array, " B"]:
    """`flow_bits` of images of 8 bits: an upper bound of -log2 of the probability of their gray levels.

    Uniform noise as wide as a gray level makes them continuous (Theis et al. 2016, equation 6): the
    probability of a level is its width times the mean density in it.

    Args:
        denoise: D(x; sigma).
        images: gray levels of 8 bits in [-1, 1], [B, H, W, C].
        keys: one per image [B]: for that noise, and for the probe of the trace.
        sigmas: of `flow_bits`.
    """

    def draw(key: Key) -> tuple[jax.Array, jax.Array]:
        inside, sign = jax.random.split(key)
        shape = images.shape[1:]
        level = jax.random.uniform(inside, shape, minval=-0.5, maxval=0.5)
        return LEVEL * level, jax.random.rademacher(sign, shape, jnp.float32)

    offset, probe = jax.vmap(draw)(keys)
    return flow_bits(denoise, images + offset, probe, sigmas) - np.log2(LEVEL)
