"""The objective and the sampler of a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.default_config import sampler
from lora_diffusion_jax.diffusion.samplers import SAMPLERS, bind
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser, init_variables
from lora_diffusion_jax.factory.objectives import build_objective, build_sampler, evaluations
from tests.small import fast_jit, random_variables, small_config


def objective_value(config, train=True, moved=0.0):
    denoiser = build_denoiser(config)
    variables = fast_jit(lambda key: init_variables(config, denoiser, key))(jax.random.key(0))
    variables = jax.tree.map(lambda v: v + moved, variables)
    objective = build_objective(config, denoiser)
    images = jnp.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)
    draws = objective.draw(jax.random.key(1), images.shape)
    loss = fast_jit(objective.loss, static_argnums=4)
    return np.asarray(loss(variables, images, None, draws, train)["loss"]), draws


@pytest.mark.parametrize(
    "precond",
    [
        *("edm", "iddpm"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vp", "ve", "ddpm")),
    ],
)
def test_objective_of_a_fresh_network_is_near_its_closed_form(precond):
    """A fresh network's F is almost zero, so D = c_skip x, and the loss follows from the draws."""
    config = small_config(precond__name=precond, augment__p=0.0, model__dropout=0.0)
    if precond == "ddpm":
        config.precond.loss = "simple"
    loss, draws = objective_value(config)
    images = np.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)
    sigma = np.asarray(draws["sigma"], np.float64)[:, None, None, None]
    skip = 0.25 / (0.25 + sigma**2) if precond == "edm" else 1.0
    weight = (0.25 + sigma**2) / (0.5 * sigma) ** 2 if precond == "edm" else sigma**-2
    expected = weight * (skip * (images + sigma * draws["noise"]) - images) ** 2
    np.testing.assert_allclose(loss, expected, rtol=0.02, atol=2e-3)


def test_losses_that_a_network_cannot_have_are_refused():
    with pytest.raises(UserError, match="precond.name=edm has no such setting"):
        build_denoiser(small_config(precond__loss="vlb"))
    with pytest.raises(UserError, match="precond.loss is 'l2'; it must be one of hybrid"):
        build_denoiser(small_config(precond__name="ddpm", precond__loss="l2"))
    config = small_config(precond__name="ddpm")
    denoiser = build_denoiser(config)
    with config.unlocked():
        config.model.learn_sigma = False
    with pytest.raises(UserError, match="hybrid trains the variances .*choose precond.loss=simple"):
        build_objective(config, denoiser)


@pytest.mark.slow
def test_frozen_base_has_no_dropout():
    frozen, free = (
        objective_value(small_config(model__dropout=0.5, train__freeze_base=f), moved=0.05)[0]
        for f in (True, False)
    )
    evaluated = objective_value(small_config(model__dropout=0.5), train=False, moved=0.05)[0]
    np.testing.assert_array_equal(frozen, evaluated)
    assert np.abs(frozen - free).max() > 0


def test_samplers_are_tried_before_anything_is_compiled():
    denoiser = build_denoiser(small_config(precond__name="ve"))

    def build(name="edm", **changes):
        config = small_config()
        config.sampler = sampler(name)
        config.sampler.update(changes)
        return build_sampler(config, denoiser)

    assert build(sigma_min=0.5).keywords["sigma_min"] == 0.5
    with pytest.raises(UserError, match="num_steps is 1"):
        build(num_steps=1)
    with pytest.raises(UserError, match="0.02 and sigma_max 0.01"):  # VE starts at 0.02
        build(sigma_max=0.01)
    with pytest.raises(UserError, match="fewer than num_steps=50"):
        build("ablation", discretization="iddpm", m=20, num_steps=50)
    with pytest.raises(UserError, match="solver is 'rk4'"):
        build("ablation", solver="rk4")


def test_label_dropout_that_class_pairs_would_not_see_is_refused():
    fields = {"class_conditional": True, "data__num_classes": 3, "model__label_dropout": 0.1}
    config = small_config(lora__adapter="time_class", **fields)
    with pytest.raises(
        UserError, match="label_dropout is 0.1.*lora.adapter=time_class would still"
    ):
        build_objective(config, build_denoiser(config))
    config.lora.mode = "baseline"
    build_objective(config, build_denoiser(config))


TINY = {"model__channel_mult": (1,), "model__attn_resolutions": (), "precond__num_steps": 30}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_discrete_network_takes_every_sampler(name):
    config = small_config(precond__name="ddpm", **TINY)
    config.sampler = sampler(name)
    config.sampler.num_steps = 3
    denoiser = build_denoiser(config)
    variables = random_variables(denoiser, jnp.zeros((1, 8, 8, 1)), jnp.ones(1), scale=0.02)
    run = build_sampler(config, denoiser)
    assert 3 <= evaluations(run, denoiser) <= 5

    @fast_jit
    def sample(variables, latents):
        return run(bind(denoiser, variables), latents, key=jax.random.key(1))

    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    images = np.asarray(sample(variables, latents))
    assert images.shape == latents.shape
    assert np.isfinite(images).all()
    assert np.std(images) > 0


def test_settings_of_another_sampler_are_errors():
    config = small_config()
    config.sampler.name = "heun"  # with the fields of edm
    with pytest.raises(UserError, match=r"sampler.name=heun has no setting sampler.s_churn"):
        build_sampler(config, build_denoiser(config))
