"""Dropout: the same entries as flax's, whatever the generator."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models.dropout import Dropout


class Both(nn.Module):
    """One of the two, under the same name, from which flax derives its key."""

    ours: bool
    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.ours:
            return Dropout(self.rate)(x, train)
        return nn.Dropout(self.rate, deterministic=not train)(x)


@pytest.mark.parametrize("rate", [0.0, 0.13, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_dropout_is_flaxs(rate: float, train: bool, impl: str) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 5, 7, 9)).astype(jnp.bfloat16)
    rngs = {"dropout": jax.random.key(7, impl=impl)}
    ours, flaxs = (
        jax.jit(Both(ours, rate).apply, static_argnums=2)({}, x, train, rngs=rngs)
        for ours in (True, False)
    )
    assert ours.dtype == flaxs.dtype
    np.testing.assert_array_equal(np.asarray(ours, "f4"), np.asarray(flaxs, "f4"))
