"""Every way to write a linen module: setup, shared layers, nn.scan, nn.remat, nn.vmap; several adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from tests.small import fast_apply, random_variables

UC = lora.UCLoRA(rank=2, bases=3, widths=(8,))
X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
C = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


class Block(nn.Module):
    """Adds a layer `qkv`; called as (x, None), as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="qkv")(nn.silu(x)), None


class Net(nn.Module):
    """The embedding `map` of c, and two blocks of any style."""

    style: str = "loop"

    @nn.compact
    def __call__(self, x, c):
        x = x + nn.Dense(6, name="map")(c)[:, None]
        if self.style == "scan":
            scan = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return scan(name="blocks")(x, None)[0]
        if self.style == "ensemble":
            vmap = nn.vmap(
                Block,
                in_axes=None,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=2,
            )
            return vmap(name="blocks")(x, None)[0]
        if self.style == "batch":
            vmap = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})
            return vmap(name="blocks")(x, None)[0]
        block = nn.remat(Block) if self.style == "remat" else Block
        for i in range(2):
            x = block(name=f"block_{i}")(x, None)[0]
        return x


class InSetup(nn.Module):
    """The net in setup style; `shared` uses one block twice."""

    shared: bool = False

    def setup(self):
        self.map = nn.Dense(6)
        self.block_0 = Block()
        self.block_1 = self.block_0 if self.shared else Block()

    def __call__(self, x, c):
        x = x + self.map(c)[:, None]
        return self.block_1(self.block_0(x, None)[0], None)[0]


def attached(net, condition="map", adapter=UC, **settings):
    return lora.attach(net, sites=r".*/qkv", adapter=adapter, condition=condition, **settings)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def gradient(module, params):
    loss = lambda params: jnp.square(module.apply({"params": params}, X, C)).mean()  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def loop():
    """The parameters of two blocks in a loop, and its output."""
    variables = random_variables(attached(Net()), X, C, scale=0.4)
    return variables["params"], fast_apply(attached(Net()), variables, X, C)


@pytest.mark.parametrize("net", [InSetup(), Net("remat")])
@pytest.mark.parametrize("condition", ["map", "function"])
def test_setup_and_remat_are_the_loop(loop, net, condition):
    params, expected = loop
    kernel, bias = params["map"]["kernel"], params["map"]["bias"]
    given = "map" if condition == "map" else (lambda x, c: c @ kernel + bias)
    wrapped = attached(net, given)
    close(fast_apply(wrapped, {"params": params}, X, C), expected)
    if condition == "map":
        close(gradient(wrapped, params), gradient(attached(Net()), params))


def test_scan_is_the_loop_over_stacked_parameters(loop):
    params, expected = loop
    blocks = jax.tree.map(lambda a, b: jnp.stack([a, b]), params["block_0"], params["block_1"])
    stacked = {"map": params["map"], "blocks": blocks}
    close(fast_apply(attached(Net("scan")), {"params": stacked}, X, C), expected)
    found, own = (gradient(attached(Net(s)), p) for s, p in (("scan", stacked), ("loop", params)))
    for i in range(2):
        close(jax.tree.map(lambda v, i=i: v[i], found["blocks"]), own[f"block_{i}"])


def test_vmap_of_an_ensemble_gives_each_copy_the_condition(loop):
    """Two copies with parameters of their own, on the same input."""
    params, _ = loop
    blocks = jax.tree.map(lambda a, b: jnp.stack([a, b]), params["block_0"], params["block_1"])
    stacked = {"map": params["map"], "blocks": blocks}
    found = fast_apply(attached(Net("ensemble")), {"params": stacked}, X, C)
    for i in range(2):
        off = jax.tree.map(jnp.zeros_like, params["block_1"])
        single = {"map": params["map"], "block_0": params[f"block_{i}"], "block_1": off}
        close(found[i], fast_apply(attached(Net()), {"params": single}, X, C))


def test_vmap_of_the_batch_inside_of_the_model_is_one_sentence():
    """The copies see one sample, but the whole condition."""
    with pytest.raises(UserError, match=r"leading shape \(4,\), the layer's input \(5,\)"):
        jax.eval_shape(attached(Net("batch")).init, jax.random.key(0), X, C)


def test_a_shared_block_has_one_adapter_for_both_uses(loop):
    params, _ = loop
    wrapped = attached(InSetup(shared=True))
    one = {"map": params["map"], "block_0": params["block_0"]}
    assert jax.tree.structure(
        jax.eval_shape(wrapped.init, jax.random.key(0), X, C)["params"]
    ) == jax.tree.structure(one)
    twice = {**one, "block_1": params["block_0"]}
    expected = fast_apply(attached(Net()), {"params": twice}, X, C)
    close(fast_apply(wrapped, {"params": one}, X, C), expected)


def test_a_condition_per_token_does_for_each_token_what_it_does_alone():
    tokens = np.random.default_rng(4).normal(size=(4, 5, 3)).astype(np.float32)
    for adapter, condition in (
        (UC, tokens),
        (lora.TimeLoRA(rank=2, bases=3, num_timesteps=9), 3 * np.abs(tokens[..., 0])),
        (lora.ClassLoRA(rank=2, num_classes=3), np.argmax(tokens, -1)),
        (lora.ClassLoRA(rank=2, num_classes=3), np.abs(tokens)),
    ):
        wrapped = attached(Layer(), lambda x, c: c, adapter)
        variables = random_variables(wrapped, X, condition)
        found = fast_apply(wrapped, variables, X, condition)
        for k in range(5):
            alone = fast_apply(wrapped, variables, X, condition[:, k])
            close(found[:, k], alone[:, k])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, c):
        return nn.Dense(5, name="qkv")(x)


def test_adapters_by_name_add_up_each_with_its_sites_condition_and_scale():
    """Against the base and each adapter alone: the model has one layer, so that all is a sum."""
    time = lora.TimeLoRA(rank=1, bases=2, num_timesteps=9, scale=0.5)
    style = attached(Layer(), lambda x, c: c, name="style")
    both = attached(style, lambda x, c: 3 * jnp.abs(c[:, 0]), time, name="time")
    params = random_variables(both, X, C)["params"]
    assert set(params["qkv"]["lora"]) == {"style", "time"}
    base, _ = lora.split(params)
    plain = fast_apply(Layer(), {"params": base}, X, C)
    full = attached(Layer(), lambda x, c: 3 * jnp.abs(c[:, 0]), time.clone(scale=1.0))
    site = {"qkv": {**base["qkv"], "lora": params["qkv"]["lora"]["time"]}}
    by_time = fast_apply(full, {"params": site}, X, C) - plain
    by_style = (
        fast_apply(
            style,
            {
                "params": {
                    "qkv": {**params["qkv"], "lora": {"style": params["qkv"]["lora"]["style"]}}
                }
            },
            X,
            C,
        )
        - plain
    )
    close(fast_apply(both, {"params": params}, X, C), plain + by_style + 0.5 * by_time)
    close(fast_apply(both.clone(enabled=False), {"params": params}, X, C), plain)
    weights = jax.jit(lambda p: lora.composition_weights(both, {"params": p}, X[:1], C[:1]))(params)
    assert set(weights["qkv"]) == {("style",), ("time",)}
    folded = fast_apply(Layer(), {"params": lora.fold(params, weights)}, X[:1], C[:1])
    close(folded, fast_apply(both, {"params": params}, X[:1], C[:1]))
