"""Adapters on our layers and on flax's own, attached from outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError


class Net(nn.Module):
    """An embedding `map`, a Dense `qkv`, a 3x3 Conv, and flax's attention."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, condition):
        emb = nn.Dense(8, name="map")(condition)
        block = nn.remat(Block) if self.remat else Block
        return block(name="block")(x) + nn.Dense(1, name="head")(emb)[:, None, None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="qkv")(x)
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(x)
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        tokens = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(tokens)
        return nn.Dense(4, use_bias=False, name="proj")(tokens.reshape(x.shape))


SITES = r".*/(qkv|conv|query|key|value|out|proj)"
ADAPTER = lora.UCLoRA(rank=2, bases=3, widths=(16, 8))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 5)).astype(np.float32)
    return x, rng.normal(size=(2, 7)).astype(np.float32)


def adapted(condition="map", sites=SITES, remat=False, adapter=ADAPTER):
    return lora.attach(Net(remat), sites=sites, adapter=adapter, condition=condition)


def perturbed(params, scale=0.3):
    """The parameters with every adapter leaf moved off its start, zeros included."""
    flat = traverse_util.flatten_dict(params)
    rng = np.random.default_rng(1)
    moved = {
        k: v + scale * rng.normal(size=v.shape).astype(np.float32) if "lora" in k else v
        for k, v in flat.items()
    }
    return traverse_util.unflatten_dict(moved)


def test_base_keeps_names_values_and_output(inputs):
    key = jax.random.key(3)
    bare, wrapped = Net().init(key, *inputs), adapted().init(key, *inputs)
    base, adapters = lora.split(wrapped["params"])
    jax.tree.map(np.testing.assert_array_equal, base, bare["params"])
    np.testing.assert_array_equal(adapted().apply(wrapped, *inputs), Net().apply(bare, *inputs))
    assert lora.list_sites(adapters) == [
        "block/attention/key",
        "block/attention/out",
        "block/attention/query",
        "block/attention/value",
        "block/conv",
        "block/proj",
        "block/qkv",
    ]


def test_parameter_tree_of_a_site(inputs):
    variables = adapted(sites=r".*/qkv").init(jax.random.key(0), *inputs)
    shapes = jax.tree.map(jnp.shape, variables["params"]["block"]["qkv"])
    assert shapes == {
        "kernel": (5, 6),
        "bias": (6,),
        "lora": {
            "down": {"kernel": (5, 6)},
            "up": {"kernel": (6, 6)},
            "bias": (6, 6),
            "composition": {
                "dense_0": {"kernel": (8, 16), "bias": (16,)},
                "norm_0": {"scale": (16,), "bias": (16,)},
                "dense_1": {"kernel": (16, 8), "bias": (8,)},
                "norm_1": {"scale": (8,), "bias": (8,)},
                "dense_out": {"kernel": (8, 3), "bias": (3,)},
            },
        },
    }


def test_dense_site_computes_the_formula(inputs):
    """y = W x + b + sum_i omega_i (B_i A_i x + sum_r bias_{i r}), basis by basis in numpy."""

    class Single(nn.Module):
        @nn.compact
        def __call__(self, x, omega):
            return nn.Dense(6, name="qkv")(x)

    class Given(lora.LowRankAdapter):
        use_bias: bool = True

        def compose(self, condition):
            return condition

    rng = np.random.default_rng(5)
    x, omega = rng.normal(size=(2, 7, 5)), rng.normal(size=(2, 3))
    wrapped = lora.attach(Single(), sites="qkv", adapter=Given(rank=2), condition=lambda x, w: w)
    params = perturbed(wrapped.init(jax.random.key(0), x, omega)["params"])
    site = jax.tree.map(lambda v: np.asarray(v, np.float64), params["qkv"])
    expected = x @ site["kernel"] + site["bias"]
    for i in range(3):
        inner = slice(2 * i, 2 * i + 2)  # basis * rank + r
        low_rank = (
            x @ site["lora"]["down"]["kernel"][:, inner] @ site["lora"]["up"]["kernel"][inner]
        )
        shift = site["lora"]["bias"][inner].sum(0)
        expected += omega[:, i, None, None] * (low_rank + shift)
    got = wrapped.apply({"params": params}, jnp.float32(x), jnp.float32(omega))
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)  # float32 against float64


def test_gradient_reaches_every_adapter_leaf_under_jit_and_remat(inputs):
    """Off the zero start every leaf has a gradient, and remat changes none of them."""
    grads = []
    params = perturbed(adapted().init(jax.random.key(0), *inputs)["params"])
    for remat in (False, True):
        wrapped = adapted(remat=remat)

        @jax.jit
        def loss(params, wrapped=wrapped):
            return jnp.square(wrapped.apply({"params": params}, *inputs)).sum()

        grads.append(jax.jit(jax.grad(loss))(params))
    flat = traverse_util.flatten_dict(lora.split(grads[0])[1])
    # The key's bias shifts all logits of a query alike, which softmax ignores: true gradient zero.
    assert all(np.abs(v).max() > 0 for k, v in flat.items() if k[-2:] != ("lora", "bias"))
    # One scale for all: a key's bias has the true gradient zero, so that its values are rounding.
    atol = 1e-5 * max(np.abs(v).max() for v in flat.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *grads)


def test_condition_function_equals_tap(inputs):
    """A function that computes what the tapped module gives is the same condition."""
    tapped = adapted()
    variables = {"params": perturbed(tapped.init(jax.random.key(0), *inputs)["params"])}
    layer = variables["params"]["map"]
    given = adapted(condition=lambda x, c: c @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(
        given.apply(variables, *inputs), tapped.apply(variables, *inputs), rtol=1e-5, atol=1e-5
    )


def test_condition_decides_and_bypass_is_the_base(inputs):
    x, condition = inputs
    wrapped = adapted()
    variables = {"params": perturbed(wrapped.init(jax.random.key(0), *inputs)["params"])}
    base = {"params": lora.split(variables["params"])[0]}
    off = wrapped.clone(enabled=False)
    np.testing.assert_array_equal(off.apply(variables, *inputs), Net().apply(base, *inputs))
    one_row = wrapped.apply(variables, x, np.stack([condition[0]] * 2))
    assert np.abs(one_row[1] - wrapped.apply(variables, *inputs)[1]).max() > 1e-3


def test_one_condition_row_serves_the_batch(inputs):
    x, condition = inputs
    wrapped = adapted(condition=lambda x, c: c)
    params = perturbed(wrapped.init(jax.random.key(0), x, condition[:1])["params"])
    wide = np.repeat(condition[:1], 2, axis=0)
    np.testing.assert_allclose(
        wrapped.apply({"params": params}, x, condition[:1]),
        wrapped.apply({"params": params}, x, wide),
        rtol=1e-5,
        atol=1e-5,
    )


def test_nested_in_another_module_and_called_twice(inputs):
    """Inside a larger module, and with the adapted module shared between two calls."""

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x, condition):
            return self.inner(x, condition) + self.inner(2 * x, condition)

    outer = Outer(adapted())
    variables = outer.init(jax.random.key(0), *inputs)
    assert set(variables["params"]["inner"]) == {"block", "head", "map"}
    params = {"params": perturbed(variables["params"])}
    inner = {"params": params["params"]["inner"]}
    x, condition = inputs
    expected = adapted().apply(inner, x, condition) + adapted().apply(inner, 2 * x, condition)
    np.testing.assert_allclose(outer.apply(params, x, condition), expected, atol=1e-5)


def test_a_layer_called_twice_has_one_adapter():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, c):
            layer = nn.Dense(5, name="qkv")
            return layer(layer(x))

    wrapped = lora.attach(Shared(), sites="qkv", adapter=ADAPTER, condition=lambda x, c: c)
    x, c = jnp.ones((2, 5)), jnp.ones((2, 3))
    variables = wrapped.init(jax.random.key(0), x, c)
    params = {"params": perturbed(variables["params"])}
    assert lora.list_sites(variables["params"]) == ["qkv"]
    assert wrapped.apply(params, x, c).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": r".*/nothing"}, ["matches no layer", "block/qkv", "block/attention/query"]),
        ({"sites": r".*/block"}, ["'block'", "Block", "Dense, DenseGeneral and Conv"]),
        ({"condition": "block/proj"}, ["was reached before", "block/proj"]),
        ({"sites": "("}, ["not a regular expression"]),
        ({"adapter": lora.UCLoRA(rank=0, bases=3)}, ["rank is 0", "positive integer"]),
        ({"adapter": lora.UCLoRA(rank=1, bases=-1)}, ["bases is -1"]),
        ({"adapter": lora.UCLoRA(rank=1, bases=2, widths=(4, 0))}, ["widths are (4, 0)"]),
        ({"condition": lambda x, c: jnp.ones((3, 8))}, ["3 rows for a batch of 2"]),
    ],
)
def test_mistakes_are_named(inputs, change, words):
    with pytest.raises(UserError) as error:
        adapted(**change).init(jax.random.key(0), *inputs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rank_one_with_one_basis_works(inputs):
    """The reference refuses rank * bases = 1."""
    wrapped = adapted(adapter=lora.UCLoRA(rank=1, bases=1, widths=()))
    variables = wrapped.init(jax.random.key(0), *inputs)
    assert variables["params"]["block"]["qkv"]["lora"]["down"]["kernel"].shape == (5, 1)


def test_attaching_twice_gives_equal_modules():
    """Equal modules share compilations where a module is a static argument of jit."""
    assert adapted() == adapted()
    assert adapted() != adapted(adapter=lora.UCLoRA(rank=2, bases=4, widths=(16, 8)))
