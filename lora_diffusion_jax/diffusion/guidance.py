"""Guidance: a denoiser led away from a weaker one, D' + w (D - D'), within an interval of noise levels.

Each function takes denoisers and returns one, so that every sampler is guided alike.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, Sigma
from lora_diffusion_jax.diffusion.samplers.plan import BoundDenoiser, precond_of
from lora_diffusion_jax.errors import UserError

Interval = tuple[float, float]
ALL_SIGMA: Interval = (0.0, math.inf)


def classifier_free(
    denoise: Denoise, unconditional: Denoise, scale: float, interval: Interval = ALL_SIGMA
) -> BoundDenoiser:
    """Classifier-free guidance (Ho & Salimans 2022) within an interval (Kynkäänniemi et al. 2024).

    Args:
        denoise: D(x; sigma) with the class labels.
        unconditional: D'(x; sigma) of the same network without labels.
        scale: w of D' + w (D - D'); 1 is D, above 1 more of the class.
        interval: guided are low < sigma <= high; elsewhere it is D.

    Raises:
        UserError: a scale that is not finite, or an interval that is none.
    """
    return guide(denoise, lambda x, s: (denoise(x, s), unconditional(x, s)), scale, interval)


def autoguidance(
    denoise: Denoise, weaker: Denoise, scale: float, interval: Interval = ALL_SIGMA
) -> BoundDenoiser:
    """Autoguidance (Karras et al. 2024): away from a weaker version of the network, with the same labels.

    Args:
        denoise: D(x; sigma).
        weaker: D'(x; sigma), trained for less long, smaller, or with its adapters scaled.
        scale, interval: as in `classifier_free`.

    Raises:
        UserError: as `classifier_free` does.
    """
    return guide(denoise, lambda x, s: (denoise(x, s), weaker(x, s)), scale, interval)


def guide(
    denoise: Denoise,
    pair: Callable[[Images, Sigma], tuple[Images, Images]],
    scale: float,
    interval: Interval = ALL_SIGMA,
) -> BoundDenoiser:
    """D' + w (D - D') where the interval holds sigma, else D; pair(x, sigma) gives (D, D').

    With one sigma for all images, as in all samplers, D' is not computed outside of the interval.
    """
    check_guidance(scale, interval)

    def led(x: Images, sigma: Sigma) -> Images:
        strong, weak = pair(x, sigma)
        return weak + scale * (strong - weak)

    def alone(x: Images, sigma: Sigma) -> Images:
        return denoise(x, sigma)

    def guided(x: Images, sigma: Sigma) -> Images:
        if tuple(interval) == ALL_SIGMA:
            return led(x, sigma)
        inside = is_inside(sigma, interval)
        if not inside.ndim:
            return jax.lax.cond(inside, led, alone, x, sigma)
        return jnp.where(inside[:, None, None, None], led(x, sigma), denoise(x, sigma))

    if scale == 1:
        return BoundDenoiser(alone, precond_of(denoise), getattr(denoise, "raw", None))
    return BoundDenoiser(guided, precond_of(denoise))


def is_inside(sigma: Sigma | np.float32, interval: Interval) -> jax.Array:
    """Whether low < sigma <= high."""
    low, high = interval
    sigma = jnp.asarray(sigma)
    return (low < sigma) & (sigma <= high)


def check_guidance(scale: float, interval: Interval) -> None:
    """Raises UserError for a scale that is not finite, or an interval that is none."""
    if not math.isfinite(scale):
        raise UserError(f"The scale of guidance is {scale}; it must be a finite number.")
    check_interval("The interval of guidance", interval)


def check_interval(name: str, interval: Interval) -> None:
    """Raises UserError unless these are two noise levels, the lower one first."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise UserError(
            f"{name} is {tuple(interval)}; expected two noise levels, the lower one first, such as "
            "(0.2, 5.0)."
        )
