"""The discrete process against OpenAI's code (tests/golden/make_iddpm.py) and closed forms."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.diffusion import discrete
from lora_diffusion_jax.diffusion.discrete import cosine_betas, linear_betas, make_process
from lora_diffusion_jax.diffusion.likelihood import variational_bound
from lora_diffusion_jax.diffusion.losses import ddpm_loss
from lora_diffusion_jax.diffusion.precond import DDPM, EDM, IDDPM, PRECONDS, VE, Denoiser
from lora_diffusion_jax.diffusion.samplers import SAMPLERS, BoundDenoiser, bind
from lora_diffusion_jax.diffusion.samplers.ancestral import choose_process
from lora_diffusion_jax.errors import UserError
from tests.diffusion.toy import MEAN, STD, Formula, formula, gaussian, ideal
from tests.small import fast_jit

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "iddpm.npz")
IMAGES = GOLDEN["images"].astype(np.float32) / 127.5 - 1
NOISE = GOLDEN["noise"].astype(np.float32)
TIMESTEPS = np.array([0, 1, 2, 500, 3000, 3999])
ROWS = {"cosine4000": [0, 1, 2, 500, 1999, 3998, 3999], "linear1000": [0, 1, 2, 500, 998, 999]}


@pytest.mark.parametrize("name", ROWS)
def test_tables_are_the_references(name):
    schedule, steps = name[:6], int(name[6:])
    process, rows = make_process(schedule, steps), ROWS[name]
    of_start, of_noisy = process.mean_coefficients
    for table, values in {
        "betas": process.betas,
        "alphas_cumprod": process.alphas_cumprod,
        "posterior_log_variance_clipped": process.log_variances[0],
        "posterior_mean_coef1": of_start,
        "posterior_mean_coef2": of_noisy,
    }.items():
        assert values.dtype == np.float64
        expected = GOLDEN[f"{name}/{table}"]
        np.testing.assert_allclose(values[rows], expected, rtol=1e-12, err_msg=table)
    np.testing.assert_array_equal(
        {"cosine": cosine_betas, "linear": linear_betas}[schedule](steps), process.betas
    )


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if key.startswith("space/")])
def test_respacings_are_the_references(key):
    steps, text = key.removeprefix("space/").split("_")
    kept = discrete.space_timesteps(int(steps), text)
    np.testing.assert_array_equal(kept, GOLDEN[key])
    whole = make_process("cosine", int(steps))
    spaced = whole.respace(text)
    np.testing.assert_array_equal(spaced.timesteps, kept)
    # From one abar to the next, 1 - beta may be 1e-9, of which float64 keeps 7 digits.
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ddim49", "no integer stride"),
        ("301", "301 steps of a section of 300"),
        ("100,201", "201 steps of a section of 150"),
        ("ten", "write the number of steps"),
        ("1,-2", "write the number of steps"),
        ("ddim2,3", "write the number of steps"),
        ("²", "write the number of steps"),
        ("0", "keeps no step"),
    ],
)
def test_impossible_respacings_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        discrete.space_timesteps(300, text)


def test_impossible_processes_are_refused():
    with pytest.raises(UserError, match="precond.schedule is 'sine'"):
        DDPM(schedule="sine")
    with pytest.raises(UserError, match="precond.loss is 'l1'"):
        DDPM(loss="l1")
    with pytest.raises(UserError, match="more than 20 steps"):
        DDPM(schedule="linear", num_steps=20)


@pytest.mark.parametrize("steps", [21, 300, 1000, 1001, 4000])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("rescale", [True, False])
def test_noise_levels_name_their_timesteps_exactly(schedule, steps, rescale):
    """Also in float32, through the network's noise label, as adapters see it."""
    precond = DDPM(schedule, steps, rescale_timesteps=rescale)
    sigma = jnp.asarray(precond.process.sigmas, jnp.float32)
    noise = fast_jit(precond.coefficients)(sigma).noise
    unit = 1000 / steps if rescale else 1
    np.testing.assert_array_equal(noise, np.arange(steps, dtype=np.float32) * unit)
    found = fast_jit(lambda c: precond.timestep(c, steps))(noise)
    np.testing.assert_array_equal(found, np.arange(steps))
    np.testing.assert_allclose(precond.time(noise), np.arange(steps) / steps, atol=1e-7)
    np.testing.assert_array_equal(precond.round_sigma(sigma), precond.process.sigmas)
    # Up to the middle between two levels, and no further.
    low, high = precond.process.sigmas[3:5]
    for share, t in ((0.49, 3), (0.51, 4)):
        assert precond.nearest(jnp.float32(low + share * (high - low))) == t


def test_noisy_images_are_the_process():
    """c_in (x_0 + sigma n) = sqrt(abar) x_0 + sqrt(1 - abar) n."""
    precond, t = DDPM(), np.array([0, 700, 3999])
    sigma = jnp.asarray(precond.process.sigmas, jnp.float32)[t]
    scale = np.float64(precond.coefficients(sigma).input)
    abar = precond.process.alphas_cumprod[t]
    np.testing.assert_allclose(scale, np.sqrt(abar), rtol=1e-6)
    np.testing.assert_allclose(scale * sigma, np.sqrt(1 - abar), rtol=1e-6)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("name", ["hybrid", "fixed_simple", "spaced_hybrid"])
def test_reverse_steps_are_the_references(name, clip):
    spaced = name.startswith("spaced")
    whole = DDPM().process
    process = whole.respace("250") if spaced else whole
    t = TIMESTEPS * len(process) // 4000
    sigma = jnp.asarray(process.sigmas, jnp.float32)[t]
    x = IMAGES + sigma.reshape(-1, 1, 1, 1) * NOISE
    denoised, raw = formula(DDPM(), learn_sigma=name != "fixed_simple").raw(x, sigma)
    denoised = jnp.clip(denoised, -1, 1) if clip else denoised
    noisy = discrete.at(process.sqrt_alphas_cumprod, t) * x
    found = {
        "pred_xstart": denoised,
        "mean": discrete.posterior_mean(process, t, denoised, noisy),
        "log_variance": discrete.log_variance(process, t, raw, 3),
    }
    for key, value in found.items():
        expected = GOLDEN[f"p/{name}/clip{clip}/{key}"]
        value = np.broadcast_to(value, expected.shape)
        # Each timestep by itself: without clipping, predictions at t = 3999 are 1e4 times the others.
        for row, wanted, step in zip(value, expected, t, strict=True):
            atol = 1e-5 * np.abs(wanted).max()
            np.testing.assert_allclose(row, wanted, atol=atol, err_msg=f"{key}, t={step}")


def loss_of(name, learn_sigma, params):
    precond = DDPM(loss=name)
    sigma = jnp.asarray(precond.process.sigmas, jnp.float32)[TIMESTEPS]
    denoiser = Denoiser(Formula(learn_sigma), precond)
    denoise = functools.partial(denoiser.apply, {"params": {"model": params}}, with_raw=True)
    return ddpm_loss(precond, denoise, IMAGES, sigma, NOISE).mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("golden", "name", "learn_sigma"),
    [
        ("hybrid", "hybrid", True),
        ("vlb", "vlb", True),
        ("fixed_simple", "simple", False),
        ("fixed_vlb", "vlb", False),
    ],
)
def test_losses_and_gradients_are_the_references(golden, name, learn_sigma):
    """The hybrid's bound trains the variances alone: a, of the mean, has the gradient of simple."""
    params = {"a": jnp.float32(0.9), "b": jnp.float32(3.0)}
    loss = fast_jit(functools.partial(loss_of, name, learn_sigma))
    np.testing.assert_allclose(loss(params), GOLDEN[f"loss/{golden}/loss"], rtol=1e-5)
    gradient = fast_jit(jax.grad(lambda p: loss_of(name, learn_sigma, p)[:-1].mean()))(params)
    expected = GOLDEN[f"loss/{golden}/gradients"]
    np.testing.assert_allclose([gradient["a"], gradient["b"]], expected, rtol=5e-4)
    if name == "hybrid":
        assert expected[0] == GOLDEN["loss/fixed_simple/gradients"][0]


def test_hybrid_loss_needs_variances():
    with pytest.raises(UserError, match="precond.loss=simple"):
        loss_of("hybrid", False, {"a": jnp.float32(0.9), "b": jnp.float32(3.0)})


@pytest.mark.parametrize(
    ("golden", "name", "learn_sigma", "settings"),
    [
        ("ddpm", "ddpm", True, {"num_steps": 10}),
        ("ddpm_free", "ddpm", True, {"respacing": "10", "clip_denoised": False}),
        ("ddpm_fixed", "ddpm", False, {"respacing": "3,7"}),
        ("ddim", "ddim", True, {"respacing": "ddim10"}),
        ("ddim_half", "ddim", True, {"num_steps": 10, "eta": 0.5}),
        ("ddim_one", "ddim", True, {"respacing": "ddim10", "eta": 1.0}),
    ],
)
def test_samples_are_the_references(golden, name, learn_sigma, settings):
    denoise = formula(DDPM(), learn_sigma)
    noise = GOLDEN["steps_noise"].astype(np.float32)
    latents = GOLDEN["latents"].astype(np.float32)
    sample = fast_jit(lambda z: SAMPLERS[name](denoise, z, noise=noise, **settings))
    expected = GOLDEN[f"sample/{golden}"]
    # The first step's prediction is amplified 8e4 times, and seen where it is not clipped.
    tolerance = 1e-5 if settings.get("clip_denoised", True) else 1e-4
    np.testing.assert_allclose(
        sample(latents), expected, atol=tolerance * np.abs(expected).max(), rtol=0
    )


@pytest.mark.parametrize("name", ["bound", "bound_fixed"])
def test_the_variational_bound_is_the_references(name):
    denoise = formula(DDPM(num_steps=20), name == "bound")
    noise = GOLDEN["bound_noise"].astype(np.float32)
    prior, terms = fast_jit(lambda x: variational_bound(denoise, x, noise=noise))(IMAGES[:2])
    np.testing.assert_allclose(prior, GOLDEN[f"{name}/prior_bpd"], rtol=1e-3)  # 1e-6 bits
    np.testing.assert_allclose(terms, GOLDEN[f"{name}/vb"], rtol=1e-4, atol=1e-6)
    total = prior + terms.sum(axis=1)
    np.testing.assert_allclose(total, GOLDEN[f"{name}/total_bpd"], rtol=1e-5)


GAUSSIAN = {  # sampler and settings, largest relative error of the standard deviation
    "ddpm": ({"num_steps": 500}, 0.05),
    "ddim": ({"num_steps": 500}, 0.02),
    "ddim-stochastic": ({"num_steps": 1000, "eta": 1.0}, 0.05),
    "edm": ({"num_steps": 64}, 0.01),
    "heun": ({"num_steps": 64}, 0.01),
    "dpmpp_2m": ({"num_steps": 64}, 0.02),
    "euler": ({"num_steps": 400}, 0.02),
    "ablation": ({"num_steps": 64}, 0.01),
}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_data_are_sampled_with_their_mean_and_variance(name):
    """The bridge: a network of the discrete process takes every sampler."""
    settings, tolerance = GAUSSIAN[name]
    denoise = ideal(DDPM("linear", 1000))
    latents = jax.random.normal(jax.random.key(0), (8, 16, 16, 4))
    latents = (latents - latents.mean()) / latents.std()
    sample = SAMPLERS[name.partition("-")[0]]
    images = fast_jit(lambda z, key: sample(denoise, z, key=key, **settings))(
        latents, jax.random.key(1)
    )
    # 8192 draws: the mean has a standard error of 1.1 % of STD, STD itself one of 0.8 %, where noise is
    # drawn; the others carry over the latents' exact mean and variance.
    assert abs(images.mean() - MEAN) < 0.045 * STD
    assert abs(images.std() / STD - 1) < tolerance


def test_ancestral_noise_is_drawn_image_by_image():
    denoise, latents = ideal(DDPM(num_steps=30)), np.zeros((4, 2, 2, 1), np.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    sample = functools.partial(SAMPLERS["ddpm"], denoise)
    whole = sample(latents, key=keys)
    np.testing.assert_allclose(sample(latents[2:3], key=keys[2:3]), whole[2:3], atol=1e-6)
    assert np.unique(whole).size == whole.size


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_ddim_takes_any_network_and_ddpm_its_own(name):
    denoise = ideal(PRECONDS[name]())
    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    sample = functools.partial(SAMPLERS["ddim"], denoise, latents, num_steps=800)
    top = min(denoise.precond.sigma_max, 80.0)
    exact = MEAN + (latents * np.sqrt(1 + top**2) - MEAN) * STD / np.sqrt(STD**2 + top**2)
    np.testing.assert_allclose(sample(), exact, atol=0.03)
    with pytest.raises(UserError, match=r"precond.name=ddpm.*use sampler.name=edm, or ddim"):
        SAMPLERS["ddpm"](denoise, latents, key=jax.random.key(0))


def test_ddim_keeps_to_the_levels_of_the_network():
    def levels(precond, *limits):
        return choose_process(BoundDenoiser(gaussian, precond), 6, "", *limits).sigmas

    process = DDPM().process.sigmas
    ends = [process[0], process[process < 80].max()]
    np.testing.assert_allclose(levels(EDM())[[0, -1]], ends, rtol=1e-9)
    np.testing.assert_allclose(levels(DDPM())[[0, -1]], process[[0, -1]], rtol=1e-6)
    assert 4 < levels(DDPM(), 0.1, 5.0)[-1] < 5
    assert 0.02 < levels(VE(), 1e-3, 500.0)[0] < levels(VE(), 1e-3, 500.0)[-1] < 100
    known = IDDPM().levels()
    gaps = np.abs(levels(IDDPM())[:, None] / known[:-1] - 1).min(axis=1)
    assert gaps.max() < 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ddpm", {"num_steps": 31}, "num_steps is 31, and the process has 30 steps to visit"),
        ("ddpm", {"respacing": "31"}, "31 steps of a section of 30"),
        ("ddpm", {"num_steps": -1}, "at least 2"),
        ("ddim", {"num_steps": 1}, "at least 2"),
        ("ddpm", {"respacing": "1"}, "respacing=1 visits a single step; ask for at least 2"),
        ("ddim", {"respacing": "ddim1"}, "respacing=ddim1 visits a single step"),
        ("ddpm", {"respacing": "0,0,1"}, "respacing=0,0,1 visits a single step"),
        (
            "ddpm",
            {"num_steps": 3, "respacing": "6"},
            "Both sampler.num_steps=3 and .*respacing='6'",
        ),
        ("ddim", {"num_steps": 3, "respacing": ""}, "Both sampler.num_steps=3 and"),
        ("ddpm", {"key": None}, "draws noise"),
        ("ddpm", {"num_steps": 3, "noise": np.zeros((2, 1, 2, 2, 1))}, "takes \\(3, 1, 2, 2, 1\\)"),
        ("ddim", {"eta": 1.5, "num_steps": 3}, "eta is 1.5"),
        ("ddim", {"sigma_min": 5.0, "sigma_max": 4.0}, "No step"),
    ],
)
def test_impossible_settings_are_refused(name, settings, words):
    denoise = ideal(DDPM(num_steps=30))
    settings = {"key": jax.random.key(0), **settings}
    with pytest.raises(UserError, match=words):
        SAMPLERS[name](denoise, np.zeros((1, 2, 2, 1), np.float32), **settings)


def test_without_its_variances_a_network_is_sampled_with_fixed_ones():
    """A function that wraps the denoiser (guidance, for example) hides them."""
    precond = DDPM(num_steps=30)
    learned, fixed = formula(precond), formula(precond, learn_sigma=False)
    wrapped = BoundDenoiser(learned.function, precond)
    latents = GOLDEN["latents"].astype(np.float32)
    sample = [
        SAMPLERS["ddpm"](d, latents, key=jax.random.key(0)) for d in (wrapped, fixed, learned)
    ]
    np.testing.assert_allclose(sample[0], sample[1], atol=1e-6)
    assert np.abs(sample[0] - sample[2]).max() > 0.01


def test_bind_gives_the_whole_output():
    denoise = bind(Denoiser(Formula(), EDM()), {"params": {"model": {"a": 1.0, "b": 1.0}}})
    x = jnp.ones((1, 2, 2, 3))
    denoised, raw = denoise.raw(x, jnp.float32(0.5))
    np.testing.assert_array_equal(denoised, denoise(x, jnp.float32(0.5)))
    assert raw.shape == (1, 2, 2, 6)
