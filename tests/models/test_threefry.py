"""Random draws of an unrolled key: JAX's, bit for bit, whatever the draw, the layout and the platform."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.models.threefry import threefry, unrolled
from tests.small import run_on_eight


def _vmapped(key: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, (5,)))(jax.random.split(key, 3))


DRAWS = {
    "uniform": functools.partial(jax.random.uniform, shape=(3, 65)),
    "normal": functools.partial(jax.random.normal, shape=(2, 3, 5)),
    "a number": functools.partial(jax.random.normal, shape=()),
    "nothing": functools.partial(jax.random.normal, shape=(0, 3)),
    "bfloat16": functools.partial(jax.random.normal, shape=(65,), dtype=jnp.bfloat16),
    "bytes": functools.partial(jax.random.bits, shape=(65,), dtype=jnp.uint8),
    "bernoulli": functools.partial(jax.random.bernoulli, p=0.3, shape=(65,)),
    "truncated": functools.partial(nn.initializers.lecun_normal(), shape=(3, 3, 8, 4)),
    "orthogonal": functools.partial(nn.initializers.orthogonal(), shape=(8, 4)),
    "permutation": functools.partial(jax.random.permutation, x=65),
    "folded": lambda key: jax.random.uniform(jax.random.fold_in(key, 2**31), (7,)),
    "vmapped": _vmapped,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_jaxs(name: str) -> None:
    key, draw = jax.random.key(7), jax.jit(DRAWS[name])
    ours, jaxs = draw(unrolled(key)), draw(key)
    assert ours.dtype == jaxs.dtype
    np.testing.assert_array_equal(np.asarray(ours, "f8"), np.asarray(jaxs, "f8"))


def test_old_keys_are_taken_and_other_generators_kept() -> None:
    old = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(
        jax.random.bits(unrolled(old), (65,)), jax.random.bits(old, (65,))
    )
    assert unrolled(jax.random.key(3)).dtype != jax.random.key(3).dtype
    rbg = jax.random.key(3, impl="rbg")
    assert unrolled(rbg) is rbg
    with jax.threefry_partitionable(False):
        assert unrolled(old) is old


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
from lora_diffusion_jax.models.threefry import unrolled
split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
draw = jax.jit(lambda key: jax.random.normal(unrolled(key), (32, 8)), out_shardings=split)
found = draw(jax.random.key(1))
assert len(found.addressable_shards) == 8
np.testing.assert_array_equal(found, jax.random.normal(jax.random.key(1), (32, 8)))
"""


def test_rows_do_not_depend_on_the_devices() -> None:
    run_on_eight("-c", SPLIT)


def test_no_loop_is_left_on_cpu() -> None:
    draw, key = jax.jit(lambda key: jax.random.bits(key, (64, 64))), jax.random.key(0)
    assert "stablehlo.while" in draw.lower(key).as_text()
    assert "stablehlo.while" not in draw.lower(unrolled(key)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_jaxs_program(platform: str) -> None:
    def lowered(key: jax.Array) -> str:
        draw = jax.jit(lambda key: jax.random.bernoulli(key, 0.3, (64, 64)))
        return draw.trace(key).lower(lowering_platforms=(platform,)).as_text()

    def counts(text: str) -> dict[str, int]:
        return {op: text.count(f"stablehlo.{op} ") for op in ("add", "xor", "while", "compare")}

    key = jax.random.key(0)
    assert counts(lowered(unrolled(key))) == counts(lowered(key))
