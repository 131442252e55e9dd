"""Samplers against closed forms of a Gaussian data set, a plain loop in float64, and the authors' grids."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.precond import EDM, IDDPM, PRECONDS, VE, Denoiser
from lora_diffusion_jax.diffusion.samplers import (
    SAMPLERS,
    Churn,
    Plan,
    ablation_sampler,
    bind,
    edm_sampler,
    make_plan,
    run_plan,
    table,
    to_uint8,
)
from lora_diffusion_jax.diffusion.samplers.plan import stack, step_noise
from lora_diffusion_jax.errors import UserError
from tests.small import fast_jit

MEAN, STD = 0.3, 0.5
SHAPE = (3, 2, 2, 1)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
RUNS = json.loads(str(GOLDEN["meta"]))


def gaussian(x, sigma):
    """The ideal denoiser of data N(MEAN, STD^2): the posterior mean."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def exact(latents, sigma_max):
    """The probability flow's end for Gaussian data: a linear map of the start."""
    start = latents * sigma_max
    return MEAN + (start - MEAN) * STD / np.sqrt(STD**2 + sigma_max**2)


FINE = {  # sampler with many steps, and the order of its method
    "edm": (functools.partial(edm_sampler, num_steps=200), 2),
    "heun": (functools.partial(SAMPLERS["heun"], num_steps=200), 2),
    "dpmpp_2m": (functools.partial(SAMPLERS["dpmpp_2m"], num_steps=200), 2),
    "euler": (functools.partial(SAMPLERS["euler"], num_steps=900), 1),
    **{
        f"{solver}-{name}": (
            functools.partial(
                ablation_sampler, num_steps=200 if order == 2 else 900, solver=solver, **kwargs
            ),
            order,
        )
        for solver, order in (("euler", 1), ("heun", 2))
        for name, kwargs in {
            "vp": {"discretization": "vp", "schedule": "vp", "scaling": "vp", "sigma_max": 80.0},
            "ve": {"discretization": "ve", "schedule": "ve", "sigma_max": 80.0},
            "iddpm": {"discretization": "iddpm", "sigma_max": 80.0, "m": 2000},
            "edm": {},
            "midpoint": {"alpha": 0.5},
        }.items()
    },
}


@pytest.mark.parametrize("name", FINE)
def test_every_sampler_solves_the_flow_of_gaussian_data(latents, name):
    sample, order = FINE[name]
    # Remaining discretization error: second order with 200 steps, first order with 900.
    tolerance = 2e-2 if order == 1 else 4e-3
    np.testing.assert_allclose(sample(gaussian, latents), exact(latents, 80.0), atol=tolerance)


def order_of(sample, latents):
    """log2 of how much twice the steps reduce the error."""
    error = [np.abs(sample(n) - exact(latents, 80.0)).max() for n in (20, 40)]
    return np.log2(error[0] / error[1])


def test_a_multistep_plan_with_carry_converges_with_second_order(latents):
    """DPM-Solver++(2M) with the state x itself, which each step first multiplies by s_{i+1} / s_i."""

    def sample(num_steps):
        sigmas = schedules.edm_grid(num_steps, 0.002, 80.0)
        ratio = sigmas[1:] / sigmas[:-1]
        h = -np.log(ratio)
        carry = [sigmas[0], *ratio]
        dt = [*(1 / ratio - 1), -1.0]
        back = [0.0, *(h[1:] / (2 * h[:-1])), 0.0]
        last = num_steps - 1
        rows = [
            Plan(
                sigma=sigma,
                scale=1.0,
                drift=float(i == last),
                pull=1.0 if i == last else -1.0,
                dt=dt[i],
                carry=carry[i],
                weights=(1 + back[i], -back[i]),
                step=i,
            )
            for i, sigma in enumerate(sigmas)
        ]
        return run_plan(gaussian, latents, stack(rows))

    assert order_of(sample, latents) > 1.7
    other = SAMPLERS["dpmpp_2m"](gaussian, latents, num_steps=12)
    np.testing.assert_allclose(sample(12), other, atol=1e-5)


def reference_heun(denoise, latents, sigmas, churn, noise):
    """Algorithm 2 of EDM, step by step in float64, as it stands in the paper."""
    x = latents.astype(np.float64) * sigmas[0]
    levels = np.append(sigmas, 0)
    for i in range(len(sigmas)):
        gamma = 0.0
        if churn.s_min <= levels[i] <= churn.s_max:
            gamma = min(churn.s_churn / len(sigmas), np.sqrt(2) - 1)
        t_hat = levels[i] * (1 + gamma)
        x = x + np.sqrt(t_hat**2 - levels[i] ** 2) * churn.s_noise * noise[i]
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (levels[i + 1] - t_hat) * d
        if levels[i + 1] > 0:
            d_next = (x_next - denoise(x_next, levels[i + 1])) / levels[i + 1]
            x_next = x + (levels[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x


def nonlinear(x, sigma):
    """No ideal denoiser, but smooth and nonlinear."""
    tanh = jnp.tanh if isinstance(x, jax.Array) else np.tanh
    return tanh(x / (1 + sigma)) + 0.1 * sigma / (1 + sigma)


@pytest.mark.parametrize("s_churn", [0.0, 40.0])
def test_edm_sampler_is_algorithm_2(latents, s_churn):
    noise = np.random.default_rng(1).normal(size=(9, *SHAPE)).astype(np.float32)
    churn = Churn(s_churn, 0.05, 50.0, 1.003)
    sigmas = schedules.edm_grid(9, 0.002, 80.0)
    expected = reference_heun(nonlinear, latents, sigmas, churn, noise)
    got = edm_sampler(nonlinear, latents, num_steps=9, noise=noise, **churn._asdict())
    np.testing.assert_allclose(got, expected, atol=2e-5)  # float32 state of size 80 at the start


def test_default_ablation_is_the_edm_sampler(latents):
    np.testing.assert_allclose(
        ablation_sampler(nonlinear, latents, num_steps=7),
        edm_sampler(nonlinear, latents, num_steps=7),
        atol=1e-6,
    )


def test_network_is_traced_once_and_evaluated_2n_minus_1_times(latents):
    traces, calls = [], []

    def denoise(x, sigma):
        traces.append(sigma.shape)
        jax.debug.callback(lambda s: calls.append(float(s)), sigma)
        return gaussian(x, sigma)

    jax.block_until_ready(jax.jit(functools.partial(edm_sampler, denoise, num_steps=6))(latents))
    jax.effects_barrier()
    assert traces == [()]
    grid = schedules.edm_grid(6, 0.002, 80.0)
    levels = [grid[0]] + [s for s in grid[1:] for _ in range(2)]
    np.testing.assert_allclose(sorted(calls, reverse=True), levels, rtol=1e-6)


def test_churn_draws_each_image_from_its_own_key(latents):
    sample = fast_jit(functools.partial(edm_sampler, gaussian, num_steps=5, s_churn=10.0))
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    whole = sample(latents, key=keys)
    alone = sample(latents[1:2], key=keys[1:2])
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    other = sample(latents, key=jax.vmap(jax.random.key)(jnp.arange(3) + 1))
    assert np.abs(whole - other).max() > 1e-2
    noise = step_noise(keys, 4, SHAPE)
    assert np.abs(noise[0] - noise[1]).max() > 0.1
    assert np.abs(noise - step_noise(keys, 3, SHAPE)).max() > 0.1


def test_churn_keeps_the_distribution():
    """Stochastic sampling of Gaussian data still gives its mean and standard deviation."""
    latents = jax.random.normal(jax.random.key(0), (4000, 2, 2, 1))
    sample = fast_jit(functools.partial(edm_sampler, gaussian, num_steps=64, s_churn=20.0))
    got = sample(latents, key=jax.random.key(1))
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.02)  # 16,000 values: 5 sigma is 0.02
    assert float(got.std()) == pytest.approx(STD, abs=0.02)


def test_edm_grid_closed_form():
    """rho = 2, three steps from 100 to 1: square roots 10, 5.5, 1."""
    np.testing.assert_allclose(schedules.edm_grid(3, 1.0, 100.0, rho=2.0), [100, 30.25, 1])


@pytest.mark.parametrize("grid", ["edm", "vp", "ve", "iddpm"])
def test_grids_decrease_between_the_ends(grid):
    sigmas = {
        "edm": lambda: schedules.edm_grid(10, 0.02, 50.0),
        "vp": lambda: schedules.vp_grid(10, 0.02, 50.0, 1e-3),
        "ve": lambda: schedules.ve_grid(10, 0.02, 50.0),
        "iddpm": lambda: schedules.iddpm_grid(10, 0.02, 50.0, 0.001, 0.008, 1000),
    }[grid]()
    assert sigmas.shape == (10,)
    assert (np.diff(sigmas) < 0).all()
    if grid != "iddpm":  # its levels are discrete
        np.testing.assert_allclose(sigmas[[0, -1]], [50.0, 0.02], rtol=1e-9)


@pytest.mark.parametrize("schedule", [schedules.vp_schedule(19.9, 0.1), schedules.VE_SCHEDULE])
def test_schedules_know_derivative_and_inverse(schedule):
    t = np.linspace(0.05, 1, 7)
    np.testing.assert_allclose(schedule.time(schedule.sigma(t)), t, rtol=1e-9)
    slope = (schedule.sigma(t + 1e-6) - schedule.sigma(t - 1e-6)) / 2e-6
    np.testing.assert_allclose(schedule.derivative(t), slope, rtol=1e-6)


class Whole(EDM):
    """A network that knows whole noise levels and 0.1."""

    def round_sigma(self, sigma):
        return np.maximum(np.round(sigma), 0.1)


def test_plan_rounds_noise_levels_to_what_the_network_knows():
    plan = make_plan(np.array([3.2, 1.1]), precond=Whole())
    np.testing.assert_array_equal(plan.sigma, [3, 1, 1])
    np.testing.assert_array_equal(plan.carry, [3, 1, 1])  # the latents' standard deviation at first


def plan_of(monkeypatch, sample, denoise):
    """The plan that a sampler runs, in float64."""
    plans = []
    monkeypatch.setattr(table, "run_plan", lambda d, x, plan, **noise: plans.append(plan))
    sample(denoise, np.zeros(SHAPE, np.float32), key=jax.random.key(0))
    return plans[0]


def bound(pre):
    """A network of this preconditioning, bound as samplers take it."""
    return bind(Denoiser(nn.Dense(1), pre), {})


@pytest.mark.parametrize("name", RUNS)
def test_defaults_give_the_noise_levels_of_the_authors_code(monkeypatch, name):
    run = RUNS[name]
    sample = functools.partial(SAMPLERS[run["sampler"]], **run["settings"])
    plan = plan_of(monkeypatch, sample, bound(PRECONDS[run["precond"]]()))
    golden = {k: GOLDEN[f"{name}/{k}"] for k in ("t_steps", "net_sigmas", "sigma_min", "sigma_max")}
    # The authors' iddpm levels come from PyTorch's float32 sine.
    tolerance = 2e-5 if "iddpm" in name else 1e-9
    np.testing.assert_allclose(plan.sigma, golden["net_sigmas"], rtol=tolerance)
    if "s_churn" not in run["settings"]:
        steps = plan.dt[plan.first] / run["settings"].get("alpha", 1)
        steps[-1] = plan.dt[plan.first][-1]  # Euler's
        times = -np.cumsum(steps[::-1])[::-1]
        np.testing.assert_allclose(times, golden["t_steps"][:-1], rtol=tolerance, atol=1e-12)
        if "iddpm" not in name:  # whose levels need not include the range's ends
            ends = golden["sigma_max"], golden["sigma_min"]
            np.testing.assert_allclose(plan.sigma[[0, -1]], ends, rtol=1e-9)


def test_iddpm_levels_are_the_authors_up_to_their_sine():
    levels = schedules.iddpm_levels(0.001, 0.008, 1000)
    np.testing.assert_allclose(levels[:-1], GOLDEN["iddpm_u"][:-1], rtol=1.5e-5)


@pytest.mark.parametrize(
    "name", sorted(set(SAMPLERS) - {"ddpm", "ddim"})
)  # those: test_discrete.py
def test_samplers_keep_to_the_levels_of_the_network(monkeypatch, name):
    sample = functools.partial(SAMPLERS[name], num_steps=6, sigma_min=1e-3, sigma_max=500.0)
    plan = plan_of(monkeypatch, sample, bound(VE()))
    assert plan.sigma.min() == pytest.approx(0.02)
    assert plan.sigma.max() == pytest.approx(100.0)
    plan = plan_of(monkeypatch, sample, bound(IDDPM()))
    assert np.isin(plan.sigma, IDDPM().levels()).all()


CHURN = ("s_churn", "s_min", "s_max", "s_noise")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 1}, "num_steps is 1"),
        ({"num_steps": 10**8}, "num_steps is 100000000.* at most 10,000"),
        ({"sigma_max": 1e300, "rho": 1e-3}, r"sigma_max 1e\+300, .*required"),
        ({"sigma_max": 1e17, "rho": 1e-3}, r"sigma_max 1e\+17 and rho 0.001 give noise levels"),
        ({"sigma_min": 1e-300}, "sigma_min is 1e-300 and"),
        ({"sigma_min": 1e-18, "rho": 1.0}, "sigma_min 1e-18, .*float32"),  # 80 - 80 in float64
        ({"rho": 1e-320}, "rho .*float32"),
        ({"rho": np.inf}, "rho is inf"),
        ({"rho": np.nan}, "rho is nan"),
        *(({name: -1.0}, f"{name} is -1;") for name in CHURN),
        *(({name: np.nan}, f"{name} is nan;") for name in CHURN),
        *(({name: np.inf}, f"{name} is inf;") for name in CHURN if name != "s_max"),
        ({"sigma_min": 81.0}, "sigma_min is 81"),
        ({"sigma_min": 0.0}, "sigma_min is 0"),
        ({"rho": -1.0}, "rho is -1"),
        ({"s_churn": 1.0}, "pass key"),
        ({"noise": np.ones((2, *SHAPE)), "s_churn": 1.0}, "noise has shape"),
    ],
)
def test_settings_without_a_grid_are_refused(latents, settings, words):
    with pytest.raises(UserError, match=words):
        edm_sampler(gaussian, latents, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "rk4"},
        {"schedule": "edm"},
        {"discretization": "x"},
        {"scaling": "ve"},
        {"alpha": 0.0},
        {"alpha": np.nan},
        {"epsilon_s": 0.0},
        {"epsilon_s": 1.0},
        {"s_noise": np.nan},
        {"c_1": 0.0, "c_2": 0.0, "discretization": "iddpm"},
        {"c_1": np.nan, "discretization": "iddpm"},
        {"c_2": -1.0, "discretization": "iddpm"},
        {"m": 0, "discretization": "iddpm"},
        {"m": 10**9, "discretization": "iddpm"},
        {"sigma_max": 1e300, "schedule": "ve", "solver": "euler"},
        {"sigma_max": 1e300, "scaling": "vp", "discretization": "ve"},
    ],
)
def test_unknown_choices_are_refused(latents, settings):
    match = {"m": "levels is", "c_2": "c_2 = -1", "c_1": "c_1 = "}
    name = next(iter(settings))
    with pytest.raises(UserError, match=match.get(name, name)):
        ablation_sampler(gaussian, latents, **settings)


def test_uint8_conversion_truncates_like_the_reference():
    values = jnp.array([-2.0, -1.0, -128 / 127.5, 0.0, 0.5 / 127.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 128, 255, 255]
