"""A sampling run as a table with one row per evaluation of the network, and the scan that executes it.

The table is written on the host in float64. One `lax.scan` over its rows traces the network once, though
Heun's method calls it at two places, and gives it a scalar noise level shared by all images.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax.array_types import Denoise, Images, Key, Labels, Sigma, Variables
from lora_diffusion_jax.diffusion.precond import ALL_LEVELS, Denoiser, Precond
from lora_diffusion_jax.errors import UserError

Table = TypeVar("Table")  # a tuple of columns


class BoundDenoiser(NamedTuple):
    """denoise(x, sigma) with the preconditioning of its network.

    Samplers take any function of x and sigma. If it has an attribute `precond`, they stay within the range
    of noise levels that it supports and round each level to one that it knows. `raw` gives (D, the whole
    output of the network), which holds the variances that networks of a discrete process learn.
    """

    function: Denoise
    precond: Precond
    raw: Callable[[Images, Sigma], tuple[Images, jax.Array]] | None = None

    def __call__(self, x: Images, sigma: Sigma) -> Images:
        return self.function(x, sigma)


def bind(
    denoiser: Denoiser, variables: Variables, class_labels: Labels | None = None
) -> BoundDenoiser:
    """D(x; sigma) of a network with its weights and labels, for a sampler."""
    apply: Callable[..., Any] = denoiser.apply
    return BoundDenoiser(
        lambda x, sigma: apply(variables, x, sigma, class_labels),
        denoiser.precond,
        lambda x, sigma: apply(variables, x, sigma, class_labels, with_raw=True),
    )


def precond_of(denoise: Denoise) -> Precond:
    """The preconditioning whose noise levels a sampler keeps to."""
    return getattr(denoise, "precond", ALL_LEVELS)


class Plan(NamedTuple):
    """The rows of a run, each field [E] or [E, K] for E evaluations (or one row, of scalars and tuples).

    With y the state entering a row (unit normal latents at the first), z unit normal noise, y0 the base of
    the row before, and d_0, d_1, ... the slopes of this row and of those before it:
        y    <- carry y + churn z
        d_0  =  drift y - pull D(y / scale; sigma)
        base =  (y if first else y0) + sum_k correct_k d_k
        y    <- base + dt sum_k weights_k d_k
    """

    sigma: Any  # noise level that the network is given
    scale: Any  # s: the state is s times a noisy image
    drift: Any
    pull: Any
    dt: Any
    carry: Any = 1.0
    churn: Any = 0.0
    weights: Any = (1.0,)
    correct: Any = (0.0,)
    first: Any = True  # of its step
    analytic: Any = False  # D is `gaussian_denoised`, no evaluation; such rows come first
    step: Any = 0  # number of the step, of which each draws noise of its own


def stack(rows: Sequence[Plan]) -> Plan:
    """Rows of scalars and tuples as a plan of columns; the tuples are filled up with zeros."""

    def column(values: tuple) -> np.ndarray:
        if not isinstance(values[0], tuple):
            return np.asarray(values)
        return np.stack(list(itertools.zip_longest(*values, fillvalue=0.0)), axis=1)

    return Plan(*map(column, zip(*rows, strict=True)))


def gaussian_denoised(x: Images, sigma: Sigma, std: float = ALL_LEVELS.sigma_data) -> Images:
    """The ideal D(x; sigma) of data N(0, std^2), which any data set's resembles at high noise levels."""
    return std**2 / (std**2 + sigma**2) * x


def run_plan(
    denoise: Denoise,
    latents: Images,
    plan: Plan,
    *,
    key: Key | None = None,
    noise: jax.Array | None = None,
) -> Images:
    """Executes a plan in one scan, with a float32 state.

    Args:
        denoise: D(x; sigma), called with a scalar sigma.
        latents: unit normal noise [B, H, W, C].
        plan: from `make_plan`, `dpmpp_plan`, ... or written by hand.
        key: one key, or one per image [B]; step i draws its noise with fold_in(key, i).
        noise: unit normal noise [num_steps, B, H, W, C] to use instead.

    Returns:
        Images [B, H, W, C], approximately in [-1, 1].

    Raises:
        UserError: a plan that adds noise, without key and noise; noise of the wrong shape; or a plan
            that float32 cannot hold.
    """
    return _execute(denoise, latents, plan, key, noise, keep=False)[0]


def trace_plan(denoise: Denoise, latents: Images, plan: Plan) -> tuple[Images, jax.Array]:
    """The states that enter the rows of a plan without noise, and its slopes d_0: two of [E, B, H, W, C]."""
    return _execute(denoise, latents, plan, None, None, keep=True)[1]


def _execute(
    denoise: Denoise,
    latents: Images,
    plan: Plan,
    key: Key | None,
    noise: jax.Array | None,
    keep: bool,
) -> tuple[Images, Any]:
    table = to_float32(plan)
    if not all(np.isfinite(column).all() for column in table):
        raise UserError(
            "These settings of the sampler give noise levels or coefficients that float32 cannot hold; "
            "choose sigma_min and sigma_max nearer to 0.002 and 80, and the others nearer to their defaults."
        )
    latents = jnp.asarray(latents, jnp.float32)
    stochastic = bool(np.any(plan.churn > 0))
    who = "A sampler with s_churn > 0" if stochastic else ""
    draw = noise_source(who, key, noise, (int(plan.step[-1]) + 1, *latents.shape))
    corrects = bool(np.any(plan.correct))  # a plan that corrects nothing computes nothing for it

    def body(denoise: Denoise, carry: tuple, row: Plan) -> tuple[tuple, Any]:
        y, base, before = carry
        y = row.carry * y
        if stochastic:  # a plan without noise draws none
            y += row.churn * draw(row.step)
        entered = y
        slopes = (row.drift * y - row.pull * denoise(y / row.scale, row.sigma), *before)
        base = jnp.where(row.first, y, base)
        if corrects:
            base += _mix(row.correct, slopes)
        y = base + row.dt * _mix(row.weights, slopes)
        return (y, base, slopes[: len(before)]), (entered, slopes[0]) if keep else None

    past = max(plan.weights.shape[1], plan.correct.shape[1]) - 1
    carry = (latents, latents, (jnp.zeros_like(latents),) * past)
    known = int(np.sum(plan.analytic))
    for i in range(known):
        carry, _ = body(gaussian_denoised, carry, jax.tree.map(lambda c: c[i], table))  # noqa: B023
    rest = jax.tree.map(lambda c: c[known:], table)
    (y, _, _), kept = jax.lax.scan(functools.partial(body, denoise), carry, rest)
    return y, kept


def _mix(weights: jax.Array, slopes: Sequence[Images]) -> Images:
    """sum_k weights_k d_k."""
    terms = [weight * d for weight, d in zip(weights, slopes, strict=False)]
    return functools.reduce(operator.add, terms)


def to_float32(table: Table) -> Table:
    """A table written in float64 as the scan runs it."""
    with np.errstate(over="ignore"):  # what becomes infinite is for the caller to see
        return jax.tree.map(lambda c: c.astype(np.float32) if c.dtype == np.float64 else c, table)


def noise_source(
    who: str, key: Key | None, noise: jax.Array | None, shape: tuple[int, ...]
) -> Callable[[jax.Array], Images]:
    """The unit normal noise of a step [B, H, W, C], by its number: drawn with the key, or replayed.

    Args:
        who: what needs the noise, for the error; "" if nothing does, and there may be neither.
        key: one key, or one per image [B]; step i draws with fold_in(key, i).
        noise: replaces the draws.
        shape: what `noise` must have: [steps, B, H, W, C].

    Raises:
        UserError: there is neither key nor noise, or noise has another shape.
    """
    if who and key is None and noise is None:
        raise UserError(f"{who} draws noise: pass key=jax.random.key(seed) or noise.")

    def draw(step: jax.Array) -> Images:
        assert key is not None
        return step_noise(key, step, shape[1:])

    if noise is None:
        return draw
    if noise.shape != shape:
        raise UserError(
            f"noise has shape {noise.shape}; this run takes {shape}: [num_steps, *latents]."
        )
    return lambda step: jnp.asarray(noise, jnp.float32)[step]


def step_noise(key: Key, step: jax.Array | int, shape: tuple[int, ...]) -> Images:
    """Unit normal noise of one step [B, H, W, C]; with a key per image, image by image."""
    if key.shape:
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, step)
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
    return jax.random.normal(jax.random.fold_in(key, step), shape)
