import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.ema import Ema


def test_first_step_takes_the_network_over():
    ema = Ema(500_000.0)
    old, new = {"w": jnp.full(3, 7.0)}, {"w": jnp.arange(3.0)}
    out = ema.update(old, new, jnp.float32(0), batch_size=128)
    np.testing.assert_array_equal(out["w"], new["w"])


def test_a_past_value_halves_over_one_halflife():
    """Without ramp-up, n images after a jump from 1 to 0 the average is 0.5 ** (n / halflife)."""
    ema, batch = Ema(1000.0, rampup_ratio=None), 50
    update = jax.jit(lambda e, seen: ema.update({"w": e}, {"w": 0.0 * e}, seen, batch)["w"])
    value = jnp.float32(1)
    for step in range(60):
        value = update(value, jnp.float32(step * batch))
        expected = 0.5 ** ((step + 1) * batch / 1000)
        # 60 multiplications in float32 keep about 60 * 6e-8.
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seen", [128, 10_000, 9_999_999, 10_000_000, 200_000_000])
def test_ramp_up_limits_the_halflife(seen):
    """EDM: beta = 0.5 ** (B / min(h, 0.05 n)), n the images before the step."""
    expected = 0.5 ** (512 / min(500_000, 0.05 * seen))
    beta = Ema(500_000.0, rampup_ratio=0.05).beta(jnp.float32(seen), 512)
    assert float(beta) == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("make", [lambda: Ema(0), lambda: Ema(10, 0)])
def test_senseless_settings_are_refused(make):
    with pytest.raises(UserError):
        make()
