"""denoise(x, sigma) of a network with its weights, which samplers keep to the network's noise levels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, Labels, Sigma, Variables
from lora_diffusion_jax.diffusion.precond import Denoiser

Round = Callable[[np.ndarray], np.ndarray]


class BoundDenoiser(NamedTuple):
    """D(x; sigma) as a function of x and sigma alone.

    Samplers accept any function denoise(x, sigma). If it has these attributes, they clip their grids to
    [sigma_min, sigma_max] and round every noise level with `round_sigma`.
    """

    function: Denoise
    sigma_min: float
    sigma_max: float
    round_sigma: Round

    def __call__(self, x: Images, sigma: Sigma) -> Images:
        return self.function(x, sigma)


def bind(
    denoiser: Denoiser, variables: Variables, class_labels: Labels | None = None
) -> BoundDenoiser:
    """denoise(x, sigma) = D(x; sigma, class_labels) with these weights, for a sampler."""

    def denoise(x: Images, sigma: Sigma) -> Images:
        return denoiser.apply(variables, x, sigma, class_labels)

    return BoundDenoiser(denoise, denoiser.sigma_min, denoiser.sigma_max, denoiser.round_sigma)


def supported_range(
    denoise: Denoise, sigma_min: float, sigma_max: float
) -> tuple[float, float]:
    """The part of [sigma_min, sigma_max] that the network supports."""
    low, high = getattr(denoise, "sigma_min", 0.0), getattr(denoise, "sigma_max", float("inf"))
    return max(sigma_min, low), min(sigma_max, high)


def rounding(denoise: Denoise) -> Round:
    """Noise levels -> the nearest that the network knows."""
    return getattr(denoise, "round_sigma", np.asarray)
