"""Multistep solvers of the probability flow ODE: one evaluation a step, and weights over past ones."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.precond import ALL_LEVELS, Precond
from lora_diffusion_jax.diffusion.samplers.plan import Plan, stack
from lora_diffusion_jax.diffusion.samplers.solvers import slope_row
from lora_diffusion_jax.errors import UserError, choose


def ipndm_plan(
    sigmas: np.ndarray,
    *,
    order: int = 4,
    to_zero: bool = True,
    precond: Precond = ALL_LEVELS,
) -> Plan:
    """iPNDM: the Adams-Bashforth weights of equal steps, on any grid (Zhang & Chen 2023).

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) sum_k w_k d_{i-k},    d_i = (x_i - D_i) / sigma_i

    The first steps are of order 1, 2, ...

    Args:
        sigmas: noise levels [N], decreasing.
        order: 1 (Euler's method) to 4.
        to_zero: a last step of first order to sigma = 0, x <- D; False ends at the last level.
        precond: of the network, whose known noise levels are used.
    """
    check_order(order, 4)

    def weights(levels: np.ndarray, i: int) -> tuple[float, ...]:
        return ADAMS_BASHFORTH[min(order, i + 1)]

    return _slope_plan(precond.round_sigma(sigmas), weights, to_zero)


def deis_plan(
    sigmas: np.ndarray,
    *,
    order: int = 3,
    to_zero: bool = True,
    precond: Precond = ALL_LEVELS,
) -> Plan:
    """DEIS, tAB-order (Zhang & Chen 2023): the slope is a polynomial in sigma through the past ones.

    x_{i+1} = x_i + sum_k d_{i-k} int_{sigma_i}^{sigma_{i+1}} l_k(s) ds

    with the Lagrange polynomials l_k of the levels sigma_i ... sigma_{i-order}; the first steps have fewer.

    Args:
        sigmas, to_zero, precond: as in `ipndm_plan`.
        order: degree of the polynomial, 1 to 3.
    """
    check_order(order, 3)

    def weights(levels: np.ndarray, i: int) -> tuple[float, ...]:
        nodes = _nodes(levels, i, order + 1)
        return integrate_interpolant(nodes, levels[i], levels[i + 1], np.ones_like)

    return _slope_plan(precond.round_sigma(sigmas), weights, to_zero)


def dpmpp_plan(
    sigmas: np.ndarray,
    *,
    order: int = 2,
    to_zero: bool = True,
    precond: Precond = ALL_LEVELS,
) -> Plan:
    """DPM-Solver++(2M) and (3M), multistep methods (Lu et al. 2022, algorithm 2), in terms of sigma.

    With lambda_i = -ln sigma_i, h_i = lambda_{i+1} - lambda_i and r_i = h_{i-1} / h_i, 2M is

        x_{i+1} = sigma_{i+1}/sigma_i x_i + (1 - sigma_{i+1}/sigma_i) D~_i
        D~_i    = (1 + 1/(2 r_i)) D_i - 1/(2 r_i) D_{i-1},    D~_0 = D_0

    In 3M, D~_i is the mean of the parabola through D_i, D_{i-1}, D_{i-2} in lambda, under the weight
    e^lambda of the exact solution. (Public code halves its curvature, which leaves second order.)
    The first steps and the last are of lower order, as there.
    The state here is y = x / sigma: y_{i+1} = y_i + (1/sigma_{i+1} - 1/sigma_i) D~_i, so that the latents
    are y_0.

    Args:
        sigmas, to_zero, precond: as in `ipndm_plan`.
        order: 1 (Euler's method in ln sigma) to 3.
    """
    check_order(order, 3)

    def weights(levels: np.ndarray, i: int) -> tuple[float, ...]:
        nodes = _log_nodes(levels, i, order, to_zero)
        h = -np.log(levels[i + 1]) - nodes[0]
        if len(nodes) == 3 and h:
            return integrate_interpolant(nodes, nodes[0], nodes[0] + h, np.exp)
        before = -h / (2 * (nodes[0] - nodes[1])) if len(nodes) > 1 else 0.0
        return 1 - before, before

    levels = precond.round_sigma(sigmas)
    rows = [_data_row(levels, i, weights(levels, i), to_zero) for i in range(len(levels) - 1)]
    return stack([*rows, _to_data(levels)] if to_zero else rows)


def unipc_plan(
    sigmas: np.ndarray,
    *,
    order: int = 3,
    variant: str = "bh2",
    to_zero: bool = True,
    precond: Precond = ALL_LEVELS,
) -> Plan:
    """UniPC (Zhao et al. 2023, algorithms 5 to 8): a multistep predictor and a corrector without evaluations.

    As in `dpmpp_plan`, x_{i+1} = sigma_{i+1}/sigma_i x_i + (1 - sigma_{i+1}/sigma_i) D~_i. The predictor has
    the D~ of D_i and `order` - 1 older ones; the corrector adds D_{i+1}, which the next row evaluates
    anyway. With two or more beside D_i the paper's linear system gives the mean of the polynomial through
    all of them, whatever its B(h). With a single one, D', its coefficient is set to 1/2:

        D~ = D_i + 1/2 B(h) / (e^-h - 1) (D' - D_i) / r,    r = (lambda' - lambda_i) / h

    The first steps and the last are of lower order.

    Args:
        sigmas, to_zero, precond: as in `ipndm_plan`.
        order: of the predictor, 1 to 3; the corrector has one more.
        variant: bh1, B(h) = -h, or bh2, B(h) = e^-h - 1.
    """
    check_order(order, 3)
    choose("variant", variant, ("bh1", "bh2"))
    levels = precond.round_sigma(sigmas)

    def weights(nodes: np.ndarray, h: float) -> tuple[float, ...]:
        if not h:
            return (1.0,)
        if len(nodes) != 2:
            return integrate_interpolant(nodes, nodes[0], nodes[0] + h, np.exp)
        other = h / (2 * (nodes[1] - nodes[0])) * (h / -np.expm1(-h) if variant == "bh1" else 1)
        return 1 - other, other

    rows, correct = [], (0.0,)
    for i in range(len(levels) - 1):
        nodes = _log_nodes(levels, i, order, to_zero)
        coming = -np.log(levels[i + 1])
        h = coming - nodes[0]
        row = _data_row(levels, i, weights(nodes, h), to_zero)
        rows.append(row._replace(correct=correct, first=i == 0))
        now, *older, newest = weights(np.append(nodes, coming), h) if h else (0.0, 0.0)
        correct = tuple(
            row.dt * w for w in (newest, now, *older)
        )  # of the next row's D and its past
    return stack([*rows, _to_data(levels)] if to_zero else rows)


ADAMS_BASHFORTH = {  # order -> weights of the newest slope and of those before it
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def integrate_interpolant(
    nodes: np.ndarray, start: float, end: float, density: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, ...]:
    """The mean over [start, end] of each Lagrange polynomial of the nodes, under a density.

    They are the weights of values at the nodes in the mean of the polynomial through them; their sum is 1.
    """
    u, w = np.polynomial.legendre.leggauss(16)
    u = start + (end - start) * (u + 1) / 2
    w = w * density(u - end)
    basis = [
        np.prod([(u - other) / (node - other) for other in np.delete(nodes, k)], axis=0)
        for k, node in enumerate(nodes)
    ]
    return tuple(float(np.sum(w * values) / np.sum(w)) for values in basis)


def check_order(order: int, most: int) -> None:
    """Raises UserError unless the order is a whole number from 1 to `most`."""
    if order not in range(1, most + 1):
        raise UserError(f"order is {order!r}; this sampler has the orders 1 to {most}.")


def _nodes(levels: np.ndarray, i: int, count: int) -> np.ndarray:
    """The newest levels up to the i-th, at most `count`, as far back as they differ.

    Rounding to what the network knows may have made two of them one.
    """
    nodes = levels[max(i + 1 - count, 0) : i + 1][::-1]
    repeated = np.flatnonzero(np.diff(nodes) == 0)
    return nodes[: repeated[0] + 1] if len(repeated) else nodes


def _log_nodes(levels: np.ndarray, i: int, count: int, to_zero: bool) -> np.ndarray:
    """lambda of `_nodes`, newest first, of which the last steps have fewer: 1 in the last of all."""
    last = len(levels) - 1 if to_zero else len(levels) - 2
    return -np.log(_nodes(levels, i, min(count, last - i + 1)))


def _slope_plan(
    levels: np.ndarray, weights: Callable[[np.ndarray, int], tuple[float, ...]], to_zero: bool
) -> Plan:
    """A multistep method in the slopes dx/dsigma = (x - D) / sigma, with weights(levels, i) for step i."""
    rows = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        slope = slope_row(sigma, schedules.LINEAR_SCHEDULE, schedules.NO_SCALING)
        carry = 1.0 if i else float(sigma)
        rows.append(
            slope._replace(carry=carry, dt=sigma_next - sigma, weights=weights(levels, i), step=i)
        )
    if to_zero:
        last = slope_row(levels[-1], schedules.LINEAR_SCHEDULE, schedules.NO_SCALING)
        rows.append(last._replace(dt=-levels[-1], step=len(rows)))
    return stack(rows)


def _data_row(levels: np.ndarray, i: int, weights: tuple[float, ...], to_zero: bool) -> Plan:
    """Step i of a multistep method in the predictions D.

    The state is x / sigma; for a run that ends at the last level it is that level times it, so that it ends
    with x.
    """
    sigma, sigma_next = levels[i : i + 2]
    unit = 1.0 if to_zero else levels[-1]
    return Plan(
        sigma,
        scale=unit / sigma,
        drift=0.0,
        pull=-1.0,
        dt=unit / sigma_next - unit / sigma,
        carry=1.0 if i else unit,
        weights=weights,
        step=i,
    )


def _to_data(levels: np.ndarray) -> Plan:
    """The last step from the state x / sigma to sigma = 0: y <- D."""
    sigma = levels[-1]
    return Plan(sigma, 1 / sigma, drift=1.0, pull=1.0, dt=-1.0, step=len(levels) - 1)
