import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.optimizer import adam, claim, ramp_up

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "lora": {"down": jnp.ones(4)}}, "b": jnp.ones(5)}


def numpy_adam(params, grads, rates, b1=0.9, b2=0.999, eps=1e-8, decay=0.0):
    """Algorithm 1 of Kingma and Ba in float64, one row of grads a step."""
    x = np.array(params, np.float64)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, (g, rate) in enumerate(zip(np.asarray(grads, np.float64), rates, strict=True), 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        x = x - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x)
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_adam_in_float64(decay):
    batch, rampup = 32, 500
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 6)) * 10.0 ** rng.integers(-4, 4, (40, 6))
    optimizer = adam(1e-2, rampup_images=rampup, weight_decay=decay)
    params = {"w": jnp.linspace(-1, 1, 6)}
    state = optimizer.init(params)
    start, rates = np.asarray(params["w"]), []
    for step, grad in enumerate(grads):
        seen = jnp.float32(step * batch)
        updates, state, rate = optimizer.update({"w": jnp.float32(grad)}, state, params, seen)
        params = {"w": params["w"] + updates["w"]}
        rates.append(float(rate))
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(1e-2)
    # 40 steps of float32: moments and sums are rounded at 6e-8 each.
    np.testing.assert_allclose(
        params["w"], numpy_adam(start, grads, rates, decay=decay), rtol=2e-6, atol=2e-7
    )


@pytest.mark.parametrize(
    ("seen", "share"), [(0, 0), (1, 1e-4), (5000, 0.5), (10_000, 1), (2.5e9, 1)]
)
def test_rate_ramps_up_over_images_seen(seen, share):
    rate = ramp_up(1e-3, 10_000)(jnp.float32(seen))
    assert float(rate) == pytest.approx(1e-3 * share, rel=1e-6)


def test_without_ramp_up_the_first_rate_is_the_full_one():
    assert float(ramp_up(1e-3, 0)(jnp.float32(0))) == pytest.approx(1e-3)


def test_clip_scales_to_the_norm():
    """Adam forgets scale in one step, so the moments are looked at."""
    optimizer = adam(1.0, clip_norm=0.5)
    params = {"w": jnp.zeros(2)}
    _, state, _ = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params, 0)
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")))
    np.testing.assert_allclose(mu["w"], 0.1 * 0.5 * np.array([0.6, 0.8]), rtol=1e-6)


def test_rate_factors_by_path():
    plain, scaled = adam(1e-2), adam(1e-2, rate_factors=[("lora", 3.0), (".*", 0.5)])
    grads = jax.tree.map(lambda p: 0.1 * p, PARAMS)
    steps = [o.update(grads, o.init(PARAMS), PARAMS, jnp.float32(0))[0] for o in (plain, scaled)]
    ratio = jax.tree.map(lambda a, b: float(b[(0,) * b.ndim] / a[(0,) * a.ndim]), *steps)
    assert ratio["a"]["lora"]["down"] == pytest.approx(3)
    assert ratio["a"]["kernel"] == ratio["b"] == pytest.approx(0.5)


def test_every_leaf_is_claimed_by_the_first_group_found():
    labels = claim(PARAMS, [("/lora/", "adapter"), ("^a/", "a"), (".*", "rest")])
    assert labels == {"a": {"kernel": "a", "lora": {"down": "adapter"}}, "b": "rest"}


def test_an_unclaimed_leaf_is_named():
    with pytest.raises(UserError, match="2 of 3 parameters belong to no group, 'a/kernel'"):
        claim(PARAMS, [("lora", "adapter")])


def test_a_group_without_leaves_is_named():
    with pytest.raises(UserError, match="lroa"):
        claim(PARAMS, [("lroa", "adapter"), (".*", "rest")])


def test_senseless_settings_are_refused():
    for options in ({"learning_rate": 0}, {"learning_rate": 1, "rampup_images": -1}):
        with pytest.raises(UserError):
            adam(**options)
