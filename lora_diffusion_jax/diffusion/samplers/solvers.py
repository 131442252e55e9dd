"""Euler's and Heun's methods for the probability flow ODE, written down as plans of network evaluations."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.precond import ALL_LEVELS, Precond
from lora_diffusion_jax.diffusion.samplers.plan import Plan, stack
from lora_diffusion_jax.diffusion.schedules import Scaling, Schedule
from lora_diffusion_jax.errors import UserError


class Churn(NamedTuple):
    """Stochasticity (EDM algorithm 2): noise added in steps whose level lies in [s_min, s_max]."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = float("inf")
    s_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level at sigma: min(S_churn / N, sqrt(2) - 1)."""
        if not self.s_min <= sigma <= self.s_max:
            return 0.0
        return min(self.s_churn / num_steps, np.sqrt(2) - 1)

    def check(self) -> None:
        """Raises UserError for values below 0, NaN, and infinity but for s_max."""
        for name, value in self._asdict().items():
            if not 0 <= value < float("inf") and not (name == "s_max" and value > 0):
                finite = "" if name == "s_max" else "finite and "
                raise UserError(f"{name} is {value:g}; it must be {finite}at least 0.")


NO_CHURN = Churn()


def make_plan(
    sigmas: np.ndarray,
    *,
    second_order: bool = True,
    euler_steps: int = 0,
    to_zero: bool = True,
    schedule: Schedule = schedules.LINEAR_SCHEDULE,
    scaling: Scaling = schedules.NO_SCALING,
    alpha: float = 1.0,
    churn: Churn = NO_CHURN,
    precond: Precond = ALL_LEVELS,
) -> Plan:
    """Euler's and Heun's methods with churn, for any schedule and scaling.

    With sigma(t) = t, s(t) = 1 and alpha = 1 this is algorithm 2 of Karras et al. 2022:

        x_0 ~ N(0, t_0^2 I)
        for i = 0 ... N-1:
            gamma_i = min(S_churn / N, sqrt(2) - 1) if S_min <= t_i <= S_max, else 0
            t^_i = t_i + gamma_i t_i
            x^_i = x_i + sqrt(t^_i^2 - t_i^2) e_i,    e_i ~ N(0, S_noise^2 I)
            d_i = (x^_i - D(x^_i; t^_i)) / t^_i
            x_{i+1} = x^_i + (t_{i+1} - t^_i) d_i
            if t_{i+1} != 0:
                d'_i = (x_{i+1} - D(x_{i+1}; t_{i+1})) / t_{i+1}
                x_{i+1} = x^_i + (t_{i+1} - t^_i) (d_i + d'_i) / 2

    Args:
        sigmas: noise levels [N], decreasing; a final 0 is added.
        second_order: False leaves out the second evaluation of a step, which gives Euler's method.
        euler_steps: so many steps at the start are Euler's in any case.
        to_zero: False does not add the 0: the N - 1 steps end at the last level.
        schedule, scaling: sigma(t) and s(t) of the ODE dx = [(s'/s + sigma'/sigma) x
            - (sigma' s / sigma) D(x / s; sigma)] dt (EDM eq. 81).
        alpha: where the second evaluation lies: t + alpha h; 1 is Heun's method, 1/2 the midpoint's.
        churn: stochasticity; s_churn = 0 gives the deterministic sampler.
        precond: of the network, whose known noise levels are used.

    Raises:
        UserError: churn or euler_steps of values that make no sense.
    """
    churn.check()
    if euler_steps < 0:
        raise UserError(f"euler_steps is {euler_steps}; it must be at least 0.")
    times = schedule.time(precond.round_sigma(sigmas))
    times = np.append(times, 0.0) if to_zero else times
    # The latents have unit variance; the first state x_0 has standard deviation sigma(t_0) s(t_0).
    start = float(schedule.sigma(times[0]) * scaling.scale(times[0]))
    rows = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        sigma = float(schedule.sigma(t))
        gamma = churn.gamma(sigma, len(sigmas))
        t_hat = t
        if gamma:
            t_hat = float(schedule.time(precond.round_sigma(np.asarray(sigma + gamma * sigma))))
        sigma_hat = float(schedule.sigma(t_hat))
        # Rounding may put sigma_hat below sigma; then there is nothing to add.
        added = np.sqrt(max(sigma_hat**2 - sigma**2, 0.0)) * scaling.scale(t_hat) * churn.s_noise
        carry = scaling.scale(t_hat) / scaling.scale(t) * (1.0 if i else start)
        h = t_next - t_hat
        row = slope_row(t_hat, schedule, scaling)._replace(carry=carry, churn=added, dt=h, step=i)
        if second_order and i >= euler_steps and t_next > 0:  # at sigma = 0 there is no slope
            weight = 1 / (2 * alpha)
            second = slope_row(t_hat + alpha * h, schedule, scaling)
            rows.append(row._replace(dt=alpha * h))
            mean = (weight, 1 - weight)
            rows.append(second._replace(dt=h, weights=mean, first=False, step=i))
        else:
            rows.append(row)
    return stack(rows)


def slope_row(t: float, schedule: Schedule, scaling: Scaling) -> Plan:
    """A row with the ODE's right-hand side at time t; its step is still to be filled in."""
    sigma, scale = float(schedule.sigma(t)), float(scaling.scale(t))
    relative = float(schedule.derivative(t)) / sigma
    drift = relative + float(scaling.derivative(t)) / scale
    return Plan(sigma, scale, drift, pull=relative * scale, dt=0.0)
