"""Noise schedules sigma(t), scalings s(t) and time grids, in float64 on the host (EDM table 1)."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lora_diffusion_jax.errors import UserError

Float64 = np.ndarray | float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """sigma(t), its derivative and its inverse."""

    sigma: Callable[[Float64], Float64]
    derivative: Callable[[Float64], Float64]
    time: Callable[[Float64], Float64]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """s(t) and its derivative: the sampler's state is s(t) times a noisy image."""

    scale: Callable[[Float64], Float64]
    derivative: Callable[[Float64], Float64]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    def sigma(t: Float64) -> Float64:
        return np.sqrt(np.expm1(0.5 * beta_d * np.square(t) + beta_min * t))

    def time(level: Float64) -> Float64:
        return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(np.square(level))) - beta_min) / beta_d

    def derivative(t: Float64) -> Float64:
        return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

    return Schedule(sigma, derivative, time)


VE_SCHEDULE = Schedule(np.sqrt, lambda t: 0.5 / np.sqrt(t), np.square)
LINEAR_SCHEDULE = Schedule(
    lambda t: np.asarray(t, np.float64), np.ones_like, lambda s: np.asarray(s, np.float64)
)
NO_SCALING = Scaling(np.ones_like, np.zeros_like)


def vp_scaling(schedule: Schedule) -> Scaling:
    """s(t) = 1 / sqrt(1 + sigma(t)^2), which keeps the state's variance near that of the data."""

    def scale(t: Float64) -> Float64:
        return 1 / np.sqrt(1 + np.square(schedule.sigma(t)))

    return Scaling(scale, lambda t: -schedule.sigma(t) * schedule.derivative(t) * scale(t) ** 3)


def vp_betas(sigma_min: float, sigma_max: float, epsilon: float) -> tuple[float, float]:
    """(beta_d, beta_min) for which sigma(epsilon) = sigma_min and sigma(1) = sigma_max."""
    low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    return float(beta_d), float(high - 0.5 * beta_d)


def check_steps(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> None:
    """Raises UserError unless a time grid can be made of these."""
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 2:
        raise UserError(
            f"num_steps is {num_steps!r}; the sampler needs at least 2 steps, since the grid runs "
            "from sigma_max to sigma_min."
        )
    if not 0 < sigma_min < sigma_max < float("inf"):
        raise UserError(
            f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; "
            "0 < sigma_min < sigma_max < infinity is needed."
        )
    if not rho > 0:
        raise UserError(f"rho is {rho:g}; it must be positive.")


def edm_grid(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """sigma_i = (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho, [N] (EDM eq. 5)."""
    ramp = np.arange(num_steps, dtype=np.float64) / (num_steps - 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def vp_grid(num_steps: int, sigma_min: float, sigma_max: float, epsilon: float) -> np.ndarray:
    """Noise levels at equal steps of VP's time from 1 to epsilon, [N]."""
    ramp = np.arange(num_steps, dtype=np.float64) / (num_steps - 1)
    return vp_schedule(*vp_betas(sigma_min, sigma_max, epsilon)).sigma(1 + ramp * (epsilon - 1))


def ve_grid(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Noise levels in geometric progression, [N]."""
    ramp = np.arange(num_steps, dtype=np.float64) / (num_steps - 1)
    return sigma_max * (sigma_min / sigma_max) ** ramp


def iddpm_levels(c_1: float, c_2: float, num_levels: int) -> np.ndarray:
    """u_0 > ... > u_M = 0 with u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1), [M + 1]."""
    j = np.arange(num_levels + 1, dtype=np.float64)
    abar = np.sin(0.5 * np.pi * j / num_levels / (c_2 + 1)) ** 2
    levels = np.zeros(num_levels + 1)
    for i in range(num_levels, 0, -1):
        ratio = max(abar[i - 1] / abar[i], c_1)
        levels[i - 1] = np.sqrt((levels[i] ** 2 + 1) / ratio - 1)
    return levels


def iddpm_grid(
    num_steps: int, sigma_min: float, sigma_max: float, levels: np.ndarray
) -> np.ndarray:
    """Every k-th of iDDPM's levels within [sigma_min, sigma_max], [N]."""
    inside = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(inside) < num_steps:
        raise UserError(
            f"The iddpm discretization has {len(inside)} levels between sigma_min {sigma_min:g} and "
            f"sigma_max {sigma_max:g}, fewer than num_steps={num_steps}; use fewer steps or a larger m."
        )
    index = np.arange(num_steps) * (len(inside) - 1) / (num_steps - 1)
    return inside[np.round(index).astype(int)]
