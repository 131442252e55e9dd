"""Dropout: the same entries as flax's, whatever the generator, the layout and the platform."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models.dropout import Dropout, bernoulli, threefry
from tests.small import run_on_eight


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


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_bernoulli_takes_old_keys_as_well(key: jax.Array) -> None:
    np.testing.assert_array_equal(bernoulli(key, 0.3, (65,)), jax.random.bernoulli(key, 0.3, (65,)))


def test_threefry_matches_the_authors_vectors() -> None:
    """The known answers of the authors' library, for 20 rounds."""
    for key, words, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        found = threefry(jnp.uint32(key), *(jnp.uint32(w) for w in words))
        assert tuple(int(x) for x in found) == expected


SPLIT = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lora_diffusion_jax.models.dropout import bernoulli
split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
draw = jax.jit(lambda key: bernoulli(key, 0.5, (32, 8)), out_shardings=split)(jax.random.key(1))
assert len(draw.addressable_shards) == 8
np.testing.assert_array_equal(draw, jax.random.bernoulli(jax.random.key(1), 0.5, (32, 8)))
"""


def test_rows_do_not_depend_on_the_devices() -> None:
    run_on_eight("-c", SPLIT)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_jaxs_program(platform: str) -> None:
    def lowered(draw) -> str:
        traced = jax.jit(lambda key: draw(key, 0.3, (64, 64))).trace(jax.random.key(0))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def counts(text: str) -> dict[str, int]:
        return {op: text.count(f"stablehlo.{op} ") for op in ("add", "xor", "while", "compare")}

    assert counts(lowered(bernoulli)) == counts(lowered(jax.random.bernoulli))
