"""Conditions of their own for adapters and scale-and-shift, against networks called with each."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.analysis import routes
from lora_diffusion_jax.factory.networks import Condition, build_denoiser
from tests.small import fast_jit, random_variables, small_config

LABELS = jnp.eye(4)
SIGMA = jnp.float32(0.7)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 8, 8, 1)), jnp.float32)


def network(**changes):
    denoiser = build_denoiser(small_config(class_conditional=True, data__num_classes=4, **changes))
    return denoiser, random_variables(denoiser, X[:1], jnp.ones(1), LABELS[:1])


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The adapters' condition for the class 1 at `factor` times the noise level, whatever the call's is."""

    condition: Condition
    factor: float

    def __call__(self, x, noise_labels, *rest):
        told = self.condition.precond.coefficients(self.factor * SIGMA[None]).noise
        return self.condition(x, told, LABELS[1:2])


def two(denoiser, variables, row):
    apply = fast_jit(routes.TwoConditions(denoiser).apply)
    return apply(variables, X, SIGMA, jnp.tile(row, (2, 1)))


def told_by(model, factor):
    """The model whose adapters get the condition of `Fixed`."""
    (attachment,) = model.attachments
    fixed = Fixed(attachment.condition, factor)
    return model.clone(attachments=(dataclasses.replace(attachment, condition=fixed),))


@pytest.mark.parametrize("adapter", [pytest.param("uc", marks=pytest.mark.slow), "time_class"])
def test_one_condition_for_both_is_the_network_itself(adapter):
    denoiser, variables = network(lora__adapter=adapter)
    row = routes.condition_rows("both", np.array([1.0]), LABELS[0], LABELS[1])
    expected = fast_jit(denoiser.apply)(variables, X, SIGMA, LABELS[1:2])
    np.testing.assert_allclose(two(denoiser, variables, row), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_guided_conditions_extrapolate_away_from_no_class(weight):
    """w c + (1 - w) 0 through both is the network told w c; one route alone keeps the other at c."""
    denoiser, variables = network(lora__adapter="class")
    label = np.asarray(LABELS[1])
    rows = {r: routes.guided_rows(r, np.array([weight]), label) for r in routes.ROUTES}
    both = fast_jit(denoiser.apply)(variables, X, SIGMA, weight * LABELS[1:2])
    np.testing.assert_allclose(two(denoiser, variables, rows["both"]), both, atol=1e-4)
    # ClassLoRA's weights are the label, so w times it is an adapter of w times the scale.
    scaled = lora.with_scale(variables, jnp.float32(weight))
    alone = fast_jit(denoiser.apply)(scaled, X, SIGMA, LABELS[1:2])
    np.testing.assert_allclose(two(denoiser, variables, rows["adapters"]), alone, atol=1e-4)
    affine = two(denoiser, variables, rows["scale_and_shift"])
    same = [np.abs(found - both).max() < 1e-4 for found in (alone, affine)]
    assert same == [weight == 1] * 2


def test_adapters_alone_see_the_second_condition():
    denoiser, variables = network(lora__adapter="time_class")
    row = routes.condition_rows("adapters", np.array([1.0]), LABELS[0], LABELS[1], factor=3.0)
    model = told_by(denoiser.model, 3.0)
    apply = fast_jit(denoiser.clone(model=model).apply)
    expected = apply(variables, X, SIGMA, LABELS[:1])
    np.testing.assert_allclose(two(denoiser, variables, row), expected, atol=1e-4)
    plain = fast_jit(denoiser.apply)(variables, X, SIGMA, LABELS[:1])
    assert np.abs(plain - expected).max() > 1e-3


def test_scale_and_shift_alone_sees_the_second_condition():
    denoiser, variables = network(lora__adapter="time_class")
    row = routes.condition_rows(
        "scale_and_shift", np.array([1.0]), LABELS[1], LABELS[2], factor=3.0
    )
    model = told_by(denoiser.model, 1.0)

    @fast_jit
    def by_hand(variables):  # D = c_skip x + c_out F(c_in x; c_noise of three times the level)
        c, told = (denoiser.precond.coefficients(s[None]) for s in (SIGMA, 3 * SIGMA))
        raw = (
            denoiser.clone(model=model).bind(variables).model(c.input * X, told.noise, LABELS[2:3])
        )
        return c.skip * X + c.out * raw

    np.testing.assert_allclose(two(denoiser, variables, row), by_hand(variables), atol=1e-4)
    plain = fast_jit(denoiser.apply)(variables, X, SIGMA, LABELS[1:2])
    assert np.abs(plain - by_hand(variables)).max() > 1e-3


def test_rows_interpolate_and_extrapolate_along_their_route():
    a, b = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])
    weights = np.array([-0.5, 0.0, 0.25, 1.0])
    mixed = np.array([[1.5, 0, -0.5], [1, 0, 0], [0.75, 0, 0.25], [0, 0, 1]])
    log = np.log(2) * weights[:, None]
    moving = np.concatenate([mixed, log], axis=1)
    still = np.broadcast_to([1.0, 0, 0, 0], (4, 4))
    for route, halves in {
        "adapters": (moving, still),
        "scale_and_shift": (still, moving),
        "both": (moving, moving),
    }.items():
        found = routes.condition_rows(route, weights, a, b, 2.0)
        np.testing.assert_allclose(found, np.concatenate(halves, axis=1), atol=1e-7)
    unconditional = routes.condition_rows("adapters", weights, factor=2.0)
    np.testing.assert_allclose(unconditional, np.concatenate([log, 0 * log], axis=1), atol=1e-7)


def test_a_straight_even_path_is_smooth_and_a_detour_is_longer():
    weights = np.linspace(-0.5, 1.5, 9)
    line = weights[:, None, None] * RNG.normal(size=(1, 3, 6))
    found = routes.smoothness(line, weights)
    assert found["ends"] == pytest.approx(np.linalg.norm(line[6] - line[2], axis=-1).mean())
    assert (found["step"], found["path"], found["largest"]) == pytest.approx((0.25, 1, 1))
    angle = np.pi * weights[:, None]
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=-1)  # 4 chords of a half circle
    found = routes.smoothness(arc, weights)
    assert found["path"] == pytest.approx(4 * np.sin(np.pi / 8))
    assert found["largest"] == pytest.approx(1)


def test_a_jump_is_uneven_and_no_change_has_no_measure():
    weights = np.linspace(0, 1, 5)
    jump = (weights > 0.6).astype(float)[:, None]
    found = routes.smoothness(jump, weights)
    assert (found["path"], found["largest"]) == (1, 4)
    still = routes.smoothness(0 * jump, weights)
    assert still == {"ends": 0.0, "step": None, "path": None, "largest": None}
