"""Surgery on parameter trees, and folding adapters into the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from tests.lora.test_attach import adapted
from tests.lora.test_composition import Layer
from tests.small import ConditionedNet, fast_apply, random_variables

TREE = {"a": {"kernel": np.ones((2, 3)), "lora": {"down": np.ones((2, 4))}}, "b": np.ones(5)}


def test_split_merge_select_count():
    base, adapters = lora.split(TREE)
    assert set(base) == {"a", "b"}
    assert set(base["a"]) == {"kernel"}
    assert set(adapters) == {"a"}
    assert set(adapters["a"]) == {"lora"}
    assert jax.tree.structure(lora.merge(base, adapters)) == jax.tree.structure(TREE)
    assert lora.select(TREE) == {"a": {"kernel": False, "lora": {"down": True}}, "b": False}
    assert lora.select(TREE, "base") == {"a": {"kernel": True, "lora": {"down": False}}, "b": True}
    assert (lora.count(TREE), lora.count(base), lora.count(adapters)) == (19, 11, 8)
    with pytest.raises(UserError, match="b;"):
        lora.merge(base, {"b": np.ones(5)})
    with pytest.raises(UserError, match="'adapters', 'base' or 'all'"):
        lora.select(TREE, "lora")


def test_folded_base_equals_the_adapted_net():
    """Dense, strided Conv, DenseGeneral in and out, with one condition for all rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 5)).astype(np.float32)
    condition = np.repeat(rng.normal(size=(1, 7)).astype(np.float32), 2, axis=0)
    wrapped = adapted(sites=r".*/(qkv|conv|query|key|value|out)")
    variables = random_variables(wrapped, x, condition, scale=0.3)
    weights = jax.jit(lambda *args: lora.composition_weights(wrapped, variables, *args))
    omegas = weights(x, condition[:1])
    assert {v.shape for v in omegas.values()} == {(1, 3)}
    folded = lora.fold(variables["params"], omegas)
    assert lora.list_sites(folded) == []
    expected = fast_apply(wrapped, variables, x, condition)
    base = {"params": lora.split(variables["params"])[0]}
    assert np.abs(expected - fast_apply(ConditionedNet(), base, x, condition)).max() > 0.1
    found = fast_apply(ConditionedNet(), {"params": folded}, x, condition)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 sums in another order


def test_fold_of_a_sum_of_adapters():
    both = lora.SumOfAdapters(
        {
            "time": lora.TimeLoRA(rank=1, bases=3, num_timesteps=10),
            "class": lora.ClassLoRA(rank=2, num_classes=4),
        }
    )
    wrapped = lora.attach(
        Layer(), sites="proj", adapter=both, condition=lambda x, t, c: {"time": t, "class": c}
    )
    x, time, ids = jnp.ones((2, 5, 6)), jnp.full(1, 3.0), jnp.full(1, 2)
    variables = random_variables(wrapped, x, time, ids)
    weights = jax.jit(lambda *args: lora.composition_weights(wrapped, variables, *args))
    folded = lora.fold(variables["params"], weights(x, time, ids))
    np.testing.assert_allclose(
        fast_apply(Layer(), {"params": folded}, x, time, ids),
        fast_apply(wrapped, variables, x, time, ids),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "given", [{}, {("time",): np.ones(3)}, {"class": np.ones(4)}, {(): np.ones(4)}]
)
def test_fold_of_weights_that_lack_an_adapter_is_one_sentence(given):
    head = {"down": {"kernel": np.ones((2, 4))}, "up": {"kernel": np.ones((4, 3))}}
    params = {"proj": {"kernel": np.ones((2, 3)), "lora": {"class": head}}}
    with pytest.raises(UserError, match=r"'proj' got weights for .*its adapter \('class',\)"):
        lora.fold(params, {"proj": given})
    alone = {"proj": {"kernel": np.ones((2, 3)), "lora": head}}
    with pytest.raises(UserError, match="no name"):
        lora.fold(alone, {"proj": {("time",): np.ones(4)}})


def test_fold_names_what_is_wrong():
    inputs = jnp.ones((1, 4, 4, 5)), jnp.ones((1, 7))
    params = random_variables(adapted(sites=".*/proj"), *inputs)["params"]
    with pytest.raises(UserError, match="adapted sites are"):
        lora.fold(params, {})
    with pytest.raises(UserError, match="one weight per basis"):
        lora.fold(params, {"block/proj": np.ones(4)})
    with pytest.raises(UserError, match="no bias to fold"):
        lora.fold(params, {"block/proj": np.ones(3)})
