"""Preconditioning, losses and objective against the formulas in numpy, draws against their laws."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.diffusion import losses
from lora_diffusion_jax.diffusion.objective import Augmentation, Objective
from lora_diffusion_jax.diffusion.precond import EDM, IDDPM, VE, VP, Denoiser
from lora_diffusion_jax.errors import UserError
from tests.small import fast_jit

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (4, 3, 3, 2)).astype(np.float32)
NOISE = RNG.normal(size=IMAGES.shape).astype(np.float32)
SIGMA = np.array([0.01, 0.5, 2.0, 70.0], np.float32)


def shrink(x, sigma):
    return x / (1 + jnp.reshape(sigma, (-1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (losses.edm_loss, lambda s: (s**2 + 0.25) / (0.5 * s) ** 2),
        (losses.vp_loss, lambda s: s**-2),
        (losses.ve_loss, lambda s: s**-2),
    ],
)
def test_loss_is_the_weighted_squared_error(loss, weight):
    s = SIGMA.astype(np.float64)[:, None, None, None]
    noisy = IMAGES.astype(np.float64) + s * NOISE
    expected = weight(s) * (noisy / (1 + s) - IMAGES) ** 2
    got = loss(shrink, IMAGES, SIGMA, NOISE)
    assert got.shape == IMAGES.shape
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)  # cancellation at sigma 0.01


def test_perfect_denoiser_has_no_loss():
    assert np.all(losses.edm_loss(lambda x, s: IMAGES, IMAGES, SIGMA, NOISE) == 0)


def test_draws_follow_their_laws():
    count = 20_000
    log = np.log(fast_jit(losses.edm_sigma, static_argnums=1)(jax.random.key(0), count))
    assert log.mean() == pytest.approx(-1.2, abs=0.05)
    assert log.std() == pytest.approx(1.2, abs=0.05)
    narrow = np.log(EDM(p_mean=-0.4, p_std=0.5).draw_sigma(jax.random.key(0), count))
    np.testing.assert_allclose(narrow, -0.4 + 0.5 / 1.2 * (log + 1.2), atol=1e-5)
    for pre in (VP(), VE(), IDDPM()):

        @fast_jit
        def draw(key, pre=pre):
            sigma = pre.draw_sigma(key, 4_000)
            return sigma, pre.time(pre.coefficients(sigma).noise)

        sigma, time = draw(jax.random.key(1))
        assert (
            pre.sigma_min * (1 - 1e-6) <= sigma.min() <= sigma.max() <= pre.sigma_max * (1 + 1e-6)
        )
        np.testing.assert_allclose(
            np.quantile(time, [0.0, 0.25, 0.5, 1.0]), [0, 0.25, 0.5, 1], atol=0.04
        )


def test_time_runs_from_0_to_1_with_the_noise_level():
    middle = {
        EDM(): 0.4,
        VP(): VP().schedule.sigma(0.5),
        VE(): 2**0.5,
        IDDPM(): IDDPM().levels()[500],
    }
    for pre, level in middle.items():
        low, high = max(pre.sigma_min, 0.002), min(pre.sigma_max, 80.0 if pre == EDM() else 1e9)
        sigma = jnp.array([low, level, high, 1e5], jnp.float32)
        time = fast_jit(lambda sigma, pre=pre: pre.time(pre.coefficients(sigma).noise))(sigma)
        np.testing.assert_allclose(time, [0, 0.5, 1, 1], atol=1e-3)


@pytest.mark.parametrize("pre", [EDM(), VP(), VE(), IDDPM()], ids=lambda p: type(p).__name__)
def test_preconditioning_is_table_1(pre):
    """D(x; sigma) of a linear F against c_skip x + c_out F(c_in x), in float64."""

    class Raw(nn.Module):
        def __call__(self, x, noise, labels, augment, train):
            return jnp.concatenate([2 * x + noise[:, None, None, None]] * pre.out_factor, -1)

    s = np.array([0.05, 0.7, 5.0])
    x = RNG.normal(size=(3, 2, 2, 1)) * s[:, None, None, None]
    s_d = 0.5
    skip, out, scale, noise = {
        "EDM": (
            s_d**2 / (s**2 + s_d**2),
            s * s_d / np.sqrt(s**2 + s_d**2),
            1 / np.sqrt(s**2 + s_d**2),
            np.log(s) / 4,
        ),
        "VP": (
            np.ones(3),
            -s,
            1 / np.sqrt(s**2 + 1),
            999 * (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + s**2)) - 0.1) / 19.9,
        ),
        "VE": (np.ones(3), s, np.ones(3), np.log(s / 2)),
        "IDDPM": (np.ones(3), -s, 1 / np.sqrt(s**2 + 1), None),
    }[type(pre).__name__]
    if noise is None:
        noise = 999 - np.abs(s[:, None] - pre.levels()[None]).argmin(1)
    column = lambda v: np.asarray(v)[:, None, None, None]  # noqa: E731
    expected = column(skip) * x + column(out) * (2 * column(scale) * x + column(noise))
    got, raw = Denoiser(Raw(), pre).apply({}, x, s, with_raw=True)
    # c_noise reaches 999 in float32
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
    np.testing.assert_array_equal(got, Denoiser(Raw(), pre).apply({}, x, s))
    assert raw.shape == (3, 2, 2, pre.out_factor)
    inner = (got - column(skip) * x) / column(out)
    np.testing.assert_allclose(raw[..., :1], inner, rtol=2e-3, atol=2e-3)


def test_edm_preconditioning_gives_unit_variance():
    """c_in x has unit variance for data of variance sigma_d^2 plus noise of variance sigma^2."""
    sigma = jnp.array([0.002, 0.5, 80.0])
    c = EDM().coefficients(sigma)
    np.testing.assert_allclose(c.input**2 * (0.25 + sigma**2), 1, rtol=1e-6)
    np.testing.assert_allclose(c.skip**2 * sigma**2 + (1 - c.skip) ** 2 * 0.25, c.out**2, rtol=1e-4)


class Noisy(nn.Module):
    """F = c_noise + mean of the labels, with noise where dropout is on."""

    @nn.compact
    def __call__(self, x, noise, labels, augment, train):
        extra = 0.0 if augment is None else augment.mean(-1)[:, None, None, None]
        dropped = nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x))
        return (noise[:, None, None, None] + extra) * dropped


def double(images, draws):
    return 2 * images, jnp.stack([draws, draws], -1)


def value(objective, train):
    """Draws and loss of IMAGES, as a training step computes them."""

    @fast_jit
    def run(key):
        draws = objective.draw(key, IMAGES.shape)
        return draws, objective.loss({}, IMAGES, None, draws, train)["loss"]

    return run(jax.random.key(0))


@pytest.mark.parametrize("pre", [EDM(), VP(), VE()], ids=lambda p: type(p).__name__)
def test_objective_augments_then_weights_the_error(pre):
    augmentation = Augmentation(lambda key, n: jax.random.normal(key, (n,)), double)
    objective = Objective(Denoiser(Noisy(), pre), augmentation)
    draws, pixels = value(objective, train=False)
    sigma = draws["sigma"]
    column = lambda v: np.asarray(v, np.float64)[:, None, None, None]  # noqa: E731
    c = pre.coefficients(sigma)
    noisy = 2 * IMAGES + column(sigma) * draws["noise"]
    denoised = column(c.skip) * noisy + column(c.out) * (column(c.noise) + column(draws["augment"]))
    expected = column(pre.weight(sigma)) * (denoised - 2 * IMAGES) ** 2
    np.testing.assert_allclose(pixels, expected, rtol=1e-3, atol=1e-4)


def test_objective_without_augmentation_or_dropout():
    objective = Objective(Denoiser(Noisy()), dropout=False)
    draws, quiet = value(objective, train=True)
    assert set(draws) == {"sigma", "noise", "dropout"}
    np.testing.assert_array_equal(quiet, value(objective, train=False)[1])
    loud = value(objective._replace(dropout=True), train=True)[1]
    assert np.abs(loud - quiet).max() > 0.1


def test_iddpm_levels_decrease_to_zero_and_round():
    levels = IDDPM().levels()
    assert levels.shape == (1001,)
    assert (np.diff(levels) < 0).all()
    assert levels[-1] == 0
    middle = (levels[500] + 2 * levels[501]) / 3
    assert IDDPM().round_sigma(np.array([middle]))[0] == levels[501]


def test_denoiser_refuses_labels_and_levels_that_do_not_fit():
    class Raw(nn.Module):
        def __call__(self, x, *rest):
            return x

    net, x = Denoiser(Raw(), num_classes=10), jnp.zeros((2, 4, 4, 1))
    with pytest.raises(UserError, match=r"\(2, 10\)"):
        net.apply({}, x, 1.0, jnp.zeros((2, 3)))
    ten = jnp.zeros((10, 4, 4, 1))  # where ten class ids could pass for one label of ten classes
    with pytest.raises(UserError, match="int32.*one_hot"):
        net.apply({}, ten, 1.0, jnp.arange(10))
    net.apply({}, ten, 1.0, np.eye(10).tolist())
    with pytest.raises(UserError, match="3 values for 2 images"):
        net.apply({}, x, jnp.ones(3))
