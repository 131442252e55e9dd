"""All solvers on one plan: order of convergence, each against its formula in float64, grids and searches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad_vec, solve_ivp

from lora_diffusion_jax.diffusion import schedules
from lora_diffusion_jax.diffusion.precond import DDPM, EDM, IDDPM, VE, Denoiser
from lora_diffusion_jax.diffusion.samplers import (
    SAMPLERS,
    BoundDenoiser,
    find_euler_steps,
    searched_grid,
)
from lora_diffusion_jax.diffusion.samplers.plan import gaussian_denoised
from lora_diffusion_jax.diffusion.samplers.search import cheapest_path
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.objectives import evaluations
from tests.small import fast_jit

SHAPE = (3, 2, 2, 1)
LOW, HIGH = 0.002, 80.0


def gaussian(x, sigma, mean=0.3, std=0.5):
    """The ideal denoiser of N(0.3, 0.5^2): linear."""
    return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def mixture(x, sigma, mean=0.5, std=0.4):
    """The ideal denoiser of an even mixture of N(-0.5, 0.4^2) and N(0.5, 0.4^2)."""
    tanh = jnp.tanh if isinstance(x, jax.Array) else np.tanh
    total = std**2 + sigma**2
    return (std**2 * x + sigma**2 * mean * tanh(mean * x / total)) / total


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@functools.cache
def exact(denoise):
    """The probability flow from HIGH to LOW: in closed form for `gaussian`, else to 1e-10 in float64."""
    start = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * np.float64(HIGH)
    if denoise is gaussian:
        return 0.3 + (start - 0.3) * np.sqrt((0.5**2 + LOW**2) / (0.5**2 + HIGH**2))

    def slope(log_sigma, x):  # in ln sigma, where the flow is smooth
        return x - denoise(x, np.exp(log_sigma))

    ends = (np.log(HIGH), np.log(LOW))
    return (
        solve_ivp(slope, ends, start.ravel(), "DOP853", rtol=1e-11, atol=1e-11)
        .y[:, -1]
        .reshape(SHAPE)
    )


ORDERS = [  # sampler, settings, order
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("ablation", {"solver": "euler"}, 1),
    ("ablation", {"alpha": 0.5}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 3),
    # The corrector adds one to UniPC's order, the first of DEIS's polynomials has degree 1.
    *(("unipc", {"order": k, "variant": b}, k + 1) for k in (1, 2, 3) for b in ("bh1", "bh2")),
    *(("deis", {"order": k}, k + 1) for k in (1, 2, 3)),
    # The weights of equal steps leave second order where steps shrink.
    *(("ipndm", {"order": k}, min(k, 2)) for k in (1, 2, 3, 4)),
]


@pytest.mark.parametrize("denoise", [gaussian, mixture])
@pytest.mark.parametrize(("name", "settings", "order"), ORDERS)
def test_every_solver_converges_with_its_order(latents, denoise, name, settings, order):
    ends_at_zero = name in ("edm", "ablation")  # which adds 1e-5, below what these two leave
    if not ends_at_zero:
        settings = {**settings, "to_zero": False}
    errors = []
    for n in (64, 128):
        sample = functools.partial(SAMPLERS[name], denoise, num_steps=n, **settings)
        errors.append(np.abs(fast_jit(sample)(latents) - exact(denoise)).max())
    assert order - 0.4 < np.log2(errors[0] / errors[1]) < order + 0.7


# --- each solver against its formula, step by step in float64 on the noisy image itself ---


def euler_reference(x, i, levels, past):
    return x + (levels[i + 1] - levels[i]) * (x - past[0]) / levels[i]


def slopes_of(states, levels, i, past):
    """d of the newest levels, newest first: states[0] is x_i."""
    return [(s - p) / levels[i - k] for k, (s, p) in enumerate(zip(states, past, strict=True))]


def polynomial(nodes, values):
    """The polynomial through values at the nodes, as a function, by its coefficients."""
    coefficients = np.linalg.solve(np.vander(nodes), np.reshape(values, (len(nodes), -1)))
    return lambda u: (np.vander([u], len(nodes)) @ coefficients).reshape(np.shape(values)[1:])


def adams(order, states, levels, i, past):
    d = slopes_of(states, levels, i, past)
    h = levels[i + 1] - levels[i]
    step = [
        lambda: d[0],
        lambda: (3 * d[0] - d[1]) / 2,
        lambda: (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12,
        lambda: (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24,
    ]
    return states[0] + h * step[min(order, i + 1) - 1]()


def deis(order, states, levels, i, past):
    count = min(order + 1, i + 1)
    d = slopes_of(states, levels, i, past)[:count]
    p = polynomial(levels[i - np.arange(count)], d)
    return states[0] + quad_vec(p, levels[i], levels[i + 1], epsabs=1e-13)[0]


def dpmpp(order, states, levels, i, past):
    count = min(order, i + 1, len(levels) - 1 - i)
    t, s = levels[i + 1], levels[i]
    lam = -np.log(levels)
    h = lam[i + 1] - lam[i]
    if count < 3:
        r = (lam[i] - lam[i - 1]) / h if count == 2 else np.inf
        mean = (1 + 1 / (2 * r)) * past[0] - (1 / (2 * r)) * past[min(1, len(past) - 1)]
        return t / s * states[0] - np.expm1(-h) * mean
    p = polynomial(lam[i - np.arange(3)], past[:3])
    # x_t / t - x_s / s = int e^lambda D dlambda
    return t / s * states[0] + t * quad_vec(lambda u: np.exp(u) * p(u), lam[i], lam[i + 1])[0]


def multistep_reference(step, denoise, x, levels):
    """Runs a method that knows the past states and predictions, newest first."""
    states, past = [], []
    for i in range(len(levels) - 1):
        states, past = [x, *states][:4], [denoise(x, levels[i]), *past][:4]
        x = step(states, levels, i, past)
    return x


def unipc_reference(order, variant, denoise, x, levels):
    """Algorithms 5 to 8 of the paper: R(h) a = phi(h) / B(h) solved at every step."""

    def update(x, s, t, nodes, values, half):
        lam_s, h = -np.log(s), np.log(s / t)
        b = -h if variant == "bh1" else np.expm1(-h)
        r = (-np.log(nodes) - lam_s) / h
        p = len(r)
        # int_0^1 e^((u-1) h) u^j du h, by quadrature: what the mean of u^j contributes.
        moment = [
            quad_vec(lambda u, j=j: np.exp((u - 1) * h) * u**j * h, 0, 1, epsabs=1e-14)[0]
            for j in range(1, p + 1)
        ]
        base = t / s * x - np.expm1(-h) * values[0]
        if p == 0:
            return base
        a = (
            np.array([0.5])
            if half
            else np.linalg.solve(r ** np.arange(p)[:, None], -np.array(moment) / b)
        )
        return base - b * sum(
            ak * (v - values[0]) / rk for ak, v, rk in zip(a, values[1:], r, strict=True)
        )

    past, seen = [denoise(x, levels[0])], [levels[0]]
    for i in range(len(levels) - 1):
        k = min(order, i + 1, len(levels) - 1 - i)
        t, s = levels[i + 1], levels[i]
        nodes, values = np.array(seen[1:k]), past[:k]
        predicted = update(x, s, t, nodes, values, half=k == 2)
        if i == len(levels) - 2:
            return predicted
        d = denoise(predicted, t)
        x = update(x, s, t, np.append(nodes, t), [*values, d], half=k == 1)
        past, seen = [d, *past], [t, *seen]
    return x


REFERENCES = {
    "euler": ("euler", {}, functools.partial(adams, 1)),
    **{f"ipndm{k}": ("ipndm", {"order": k}, functools.partial(adams, k)) for k in (2, 3, 4)},
    **{f"deis{k}": ("deis", {"order": k}, functools.partial(deis, k)) for k in (1, 2, 3)},
    "dpmpp_2m": ("dpmpp_2m", {}, functools.partial(dpmpp, 2)),
    "dpmpp_3m": ("dpmpp_3m", {}, functools.partial(dpmpp, 3)),
    **{
        f"unipc{k}-{b}": ("unipc", {"order": k, "variant": b}, (k, b))
        for k, b in itertools.product((1, 2, 3), ("bh1", "bh2"))
    },
}


@pytest.mark.parametrize("name", REFERENCES)
def test_solvers_are_their_formulas(latents, name):
    sampler, settings, reference = REFERENCES[name]
    levels = schedules.edm_grid(8, 0.02, 10.0)
    start = latents.astype(np.float64) * levels[0]
    if sampler == "unipc":
        expected = unipc_reference(*reference, mixture, start, levels)
    else:
        expected = multistep_reference(reference, mixture, start, levels)
    run = functools.partial(SAMPLERS[sampler], mixture, sigma_min=0.02, sigma_max=10.0, **settings)
    got = run(latents, num_steps=7, to_zero=False)
    np.testing.assert_allclose(got, expected, atol=3e-5)  # float32 state of size 10 at the start


def test_the_last_step_to_zero_is_the_prediction(latents):
    """Where the network is exact at the last level, the step removes its noise."""
    for name in ("euler", "dpmpp_3m", "unipc", "deis", "ipndm"):
        run = functools.partial(SAMPLERS[name], mixture, latents, sigma_min=0.02)
        seen = []

        def spy(x, sigma, seen=seen):
            jax.debug.callback(lambda x, s: seen.append((float(s), x)), x, sigma)
            return mixture(x, sigma)

        got = jax.block_until_ready(SAMPLERS[name](spy, latents, num_steps=6, sigma_min=0.02))
        jax.effects_barrier()
        sigma, x = min(seen, key=lambda entry: entry[0])
        assert sigma == pytest.approx(0.02)
        expected = mixture(np.asarray(x, np.float64), sigma)
        np.testing.assert_allclose(got, expected, atol=1e-5)  # x - sigma (x - D) / sigma in float32
        assert np.abs(got - run(num_steps=5, to_zero=False)).max() > 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        *((name, {}, 7) for name in ("euler", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm")),
        *((name, {"afs": True}, 6) for name in ("euler", "dpmpp_3m", "unipc", "deis", "ipndm")),
        ("unipc", {"to_zero": False}, 7),
        ("heun", {}, 13),
        ("heun", {"to_zero": False}, 14),
        ("heun", {"euler_steps": 3}, 10),
        ("heun", {"euler_steps": 3, "afs": True}, 9),
        ("heun", {"euler_steps": 99}, 7),
    ],
)
def test_number_of_evaluations(name, settings, expected):
    sampler = functools.partial(SAMPLERS[name], num_steps=7, **settings)
    assert evaluations(sampler, Denoiser(None)) == expected


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_3m", "unipc", "deis", "ipndm"])
def test_an_analytic_first_step_is_that_of_gaussian_data(latents, name):
    """With the Gaussian's own denoiser it changes nothing; with another, only the first evaluation."""
    run = functools.partial(SAMPLERS[name], num_steps=6)
    same = run(gaussian_denoised, latents, afs=True)
    np.testing.assert_allclose(same, run(gaussian_denoised, latents), atol=1e-5)

    def other(x, sigma):
        return jnp.where(sigma > 79, gaussian_denoised(x, sigma), mixture(x, sigma))

    got = run(mixture, latents, afs=True)
    np.testing.assert_allclose(got, run(other, latents), atol=1e-5)
    assert np.abs(got - run(mixture, latents)).max() > 1e-6


def test_a_mixed_plan_is_euler_then_heun(latents):
    levels = np.append(schedules.edm_grid(6, LOW, HIGH), 0)
    x = latents.astype(np.float64) * HIGH
    for i in range(6):
        h = levels[i + 1] - levels[i]
        d = (x - mixture(x, levels[i])) / levels[i]
        ahead = x + h * d
        if i >= 2 and levels[i + 1]:
            d = (d + (ahead - mixture(ahead, levels[i + 1])) / levels[i + 1]) / 2
        x = x + h * d
    got = SAMPLERS["heun"](mixture, latents, num_steps=6, euler_steps=2)
    np.testing.assert_allclose(got, x, atol=2e-5)


def test_eulers_steps_end_where_the_slope_turns(latents):
    """For N(0, s^2) the slope's size is sigma / sqrt(sigma^2 + s^2) of its start: it changes near s."""
    sigmas = schedules.edm_grid(18, LOW, HIGH)
    found = find_euler_steps(gaussian_denoised, latents, sigmas, tolerance=0.1)
    slope = sigmas / np.sqrt(sigmas**2 + 0.5**2)
    turns = 1 - slope[1:] / slope[:-1] > 0.1
    assert (
        abs(found - turns.argmax()) <= 1
    )  # Euler's step sees the slope a little off the exact flow
    assert 5 < found < 15
    assert find_euler_steps(gaussian_denoised, latents, sigmas, tolerance=10.0) == 17
    assert find_euler_steps(gaussian_denoised, latents, sigmas, tolerance=0.0) == 0


# --- grids ---


def test_grids_by_name(latents):
    levels = functools.partial(schedules.ve_grid, 5, 0.02, 50.0)()
    np.testing.assert_allclose(np.diff(np.log(levels)), np.log(0.02 / 50) / 4)
    got = SAMPLERS["euler"](
        mixture, latents, num_steps=5, sigma_min=0.02, sigma_max=50.0, grid="log_snr"
    )
    given = functools.partial(SAMPLERS["euler"], mixture, latents, sigma_min=0.02, sigma_max=50.0)
    np.testing.assert_array_equal(got, given(num_steps=5, grid="searched", sigmas=levels))
    # sigma = sqrt(e^(g(t)) - 1) at equal steps of VP's t, from 1 to 0.001
    uniform = schedules.vp_grid(5, 0.02, 50.0, 1e-3)
    got = given(num_steps=5, grid="uniform")
    np.testing.assert_array_equal(got, given(num_steps=5, grid="searched", sigmas=uniform))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grid": "cosine"}, "grid is 'cosine'; it must be one of rho, log_snr"),
        ({"grid": "searched"}, "grid=searched has no sigmas yet"),
        ({"sigmas": (80.0, 0.002)}, "sigmas are given beside grid=rho"),
        ({"grid": "searched", "sigmas": (80.0, 1.0, 0.002)}, "3 values, 80 to 0.002; expected 4"),
        (
            {"grid": "searched", "sigmas": (80.0, 1.0, 2.0, 0.002)},
            "4 values, 80 to 0.002; expected 4",
        ),
        ({"grid": "searched", "sigmas": (90.0, 2.0, 1.0, 0.002)}, "within 80 and 0.002"),
        ({"grid": "searched", "sigmas": (80.0, np.nan, 1.0, 0.002)}, "decreasing"),
        ({"order": 5}, "order is 5; this sampler has the orders 1 to 4"),
        ({"order": 0}, "order is 0"),
        ({"order": 1.5}, "order is 1.5"),
        ({"num_steps": 1}, "num_steps is 1"),
    ],
)
def test_bad_settings_are_one_sentence(latents, settings, words):
    with pytest.raises(UserError, match=words):
        SAMPLERS["ipndm"](mixture, latents, **{"num_steps": 4, **settings})


def test_bad_settings_of_other_solvers(latents):
    with pytest.raises(UserError, match="variant is 'bh3'; it must be one of bh1, bh2"):
        SAMPLERS["unipc"](mixture, latents, variant="bh3")
    with pytest.raises(UserError, match="orders 1 to 3"):
        SAMPLERS["deis"](mixture, latents, order=4)
    with pytest.raises(UserError, match="euler_steps is -1; it must be at least 0"):
        SAMPLERS["heun"](mixture, latents, euler_steps=-1)


def test_the_cheapest_path_is_that_of_trying_all():
    costs = np.random.default_rng(2).uniform(size=(8, 8))
    for num_steps, discount in itertools.product((1, 2, 4, 7), (1.0, 1.3)):

        def total(path, discount=discount):
            steps = enumerate(itertools.pairwise(path))
            return sum(discount**k * costs[i, j] for k, (i, j) in steps)

        paths = [(0, *p, 7) for p in itertools.combinations(range(1, 7), num_steps - 1)]
        assert tuple(cheapest_path(costs, num_steps, discount)) == min(paths, key=total)


def test_a_searched_grid_beats_the_usual_one():
    """Euler's error on data whose trajectories bend at low noise."""
    sharp = functools.partial(mixture, mean=0.6, std=0.2)
    rng = np.random.default_rng(3)
    chosen_on, tried_on = rng.normal(size=(2, 64, 2, 2, 1)).astype(np.float32)
    sigmas = searched_grid(sharp, chosen_on, 6)
    assert sigmas.shape == (6,)
    np.testing.assert_allclose(sigmas[[0, -1]], [HIGH, LOW], rtol=1e-9)
    run = functools.partial(SAMPLERS["euler"], sharp, tried_on)
    fine = SAMPLERS["heun"](sharp, tried_on, num_steps=200)
    usual = np.sqrt(np.mean((run(num_steps=6) - fine) ** 2))
    searched = np.sqrt(np.mean((run(num_steps=6, grid="searched", sigmas=sigmas) - fine) ** 2))
    assert searched < 0.9 * usual
    assert len(searched_grid(sharp, chosen_on, 6, to_zero=False)) == 7
    with pytest.raises(UserError, match="A grid of 9 levels cannot be chosen out of 6"):
        searched_grid(sharp, chosen_on, 9, fine_steps=5)


@pytest.mark.parametrize("precond", [DDPM(num_steps=50), IDDPM()])
def test_a_searched_grid_of_known_levels_is_accepted(precond):
    """Its ends are levels of the network, which may lie outside of the range that was asked for."""
    chosen_on = np.random.default_rng(3).normal(size=(8, 2, 2, 1)).astype(np.float32)
    denoise = BoundDenoiser(mixture, precond)
    sigmas = [float(f"{level:.6g}") for level in searched_grid(denoise, chosen_on, 5)]
    images = SAMPLERS["euler"](denoise, chosen_on, num_steps=5, grid="searched", sigmas=sigmas)
    assert np.isfinite(images).all()


class Whole(EDM):
    """A network that knows whole noise levels and 0.1."""

    def round_sigma(self, sigma):
        return np.maximum(np.round(sigma), 0.1)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "ipndm"])
def test_levels_rounded_to_one_leave_multistep_solvers_finite(latents, name):
    end = 0.3 + (latents * HIGH - 0.3) * 0.5 / np.sqrt(0.5**2 + HIGH**2)
    got = SAMPLERS[name](BoundDenoiser(gaussian, Whole()), latents, num_steps=40)
    np.testing.assert_allclose(got, end, atol=0.4)


def test_searched_levels_are_those_of_the_network(latents):
    levels = searched_grid(BoundDenoiser(mixture, Whole()), latents, 5)
    assert set(levels) <= {*range(1, 81), 0.1}
    levels = searched_grid(BoundDenoiser(mixture, VE()), latents, 5)
    np.testing.assert_allclose(levels[[0, -1]], [80.0, 0.02], rtol=1e-9)
