import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.optimizer import adam, ramp_up


def numpy_adam(params, grads, rates, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 of Kingma and Ba in float64, one row of grads a step."""
    x = np.array(params, np.float64)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, (g, rate) in enumerate(zip(np.asarray(grads, np.float64), rates, strict=True), 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        x = x - rate * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    return x


def test_equals_adam_in_float64():
    batch, rampup = 32, 500
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(40, 6)) * 10.0 ** rng.integers(-4, 4, (40, 6))
    optimizer = adam(1e-2, rampup_images=rampup)
    params = {"w": jnp.linspace(-1, 1, 6)}
    state = optimizer.init(params)
    start, rates = np.asarray(params["w"]), []
    for step, grad in enumerate(grads):
        seen = jnp.float32(step * batch)
        updates, state = optimizer.update({"w": jnp.float32(grad)}, state, params, seen)
        params = {"w": params["w"] + updates["w"]}
        rates.append(float(optimizer.rate(seen)))
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(1e-2)
    # 40 steps of float32: moments and sums are rounded at 6e-8 each.
    np.testing.assert_allclose(params["w"], numpy_adam(start, grads, rates), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("seen", "share"), [(0, 0), (1, 1e-4), (5000, 0.5), (10_000, 1), (2.5e9, 1)]
)
def test_rate_ramps_up_over_images_seen(seen, share):
    rate = ramp_up(1e-3, 10_000)(jnp.float32(seen))
    assert float(rate) == pytest.approx(1e-3 * share, rel=1e-6)


def test_without_ramp_up_the_first_rate_is_the_full_one():
    assert float(ramp_up(1e-3, 0)(jnp.float32(0))) == pytest.approx(1e-3)


def test_senseless_settings_are_refused():
    for options in ({"learning_rate": 0}, {"learning_rate": 1, "rampup_images": -1}):
        with pytest.raises(UserError):
            adam(**options)
