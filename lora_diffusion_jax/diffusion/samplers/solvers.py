"""Solvers of the probability flow ODE, each written down as a plan of network evaluations."""

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
        schedule, scaling: sigma(t) and s(t) of the ODE dx = [(s'/s + sigma'/sigma) x
            - (sigma' s / sigma) D(x / s; sigma)] dt (EDM eq. 81).
        alpha: where the second evaluation lies: t + alpha h; 1 is Heun's method, 1/2 the midpoint's.
        churn: stochasticity; s_churn = 0 gives the deterministic sampler.
        precond: of the network, whose known noise levels are used.

    Raises:
        UserError: churn of values that make no sense.
    """
    churn.check()
    times = np.append(schedule.time(precond.round_sigma(sigmas)), 0.0)
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
        row = _slope(t_hat, schedule, scaling)._replace(carry=carry, churn=added, dt=h, step=i)
        if second_order and t_next > 0:  # at sigma = 0 there is no slope
            weight = 1 / (2 * alpha)
            second = _slope(t_hat + alpha * h, schedule, scaling)
            rows.append(row._replace(dt=alpha * h))
            rows.append(second._replace(dt=h, now=weight, before=1 - weight, first=False, step=i))
        else:
            rows.append(row)
    return stack(rows)


def _slope(t: float, schedule: Schedule, scaling: Scaling) -> Plan:
    """A row with the ODE's right-hand side at time t; its step is still to be filled in."""
    sigma, scale = float(schedule.sigma(t)), float(scaling.scale(t))
    relative = float(schedule.derivative(t)) / sigma
    drift = relative + float(scaling.derivative(t)) / scale
    return Plan(sigma, scale, drift, pull=relative * scale, dt=0.0)


def dpmpp_2m_plan(sigmas: np.ndarray, *, precond: Precond = ALL_LEVELS) -> Plan:
    """DPM-Solver++(2M), a second-order multistep method (Lu et al. 2022, algorithm 2), in terms of sigma.

    With lambda_i = -ln sigma_i, h_i = lambda_{i+1} - lambda_i and r_i = h_{i-1} / h_i:

        x_{i+1} = sigma_{i+1}/sigma_i x_i + (1 - sigma_{i+1}/sigma_i) D~_i
        D~_i    = (1 + 1/(2 r_i)) D_i - 1/(2 r_i) D_{i-1},    D~_0 = D_0

    and a last step to sigma = 0 of first order, x_N = D_{N-1}. The state here is y = x / sigma:
    y_{i+1} = y_i + (1/sigma_{i+1} - 1/sigma_i) D~_i, so that the latents are y_0.

    Args:
        sigmas: noise levels [N], decreasing; a final 0 is added.
        precond: of the network, whose known noise levels are used.
    """
    sigmas = precond.round_sigma(sigmas)
    h = -np.diff(np.log(sigmas))
    rows = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        # h is 0 where two levels were rounded to one; such a step has no slope to extrapolate.
        before = -h[i] / (2 * h[i - 1]) if i and h[i - 1] else 0.0
        dt = 1 / sigma_next - 1 / sigma
        weights = {"now": 1 - before, "before": before}
        rows.append(Plan(sigma, 1 / sigma, drift=0.0, pull=-1.0, dt=dt, step=i, **weights))
    last = Plan(sigmas[-1], 1 / sigmas[-1], drift=1.0, pull=1.0, dt=-1.0, step=len(rows))  # y <- D
    return stack([*rows, last])
