"""Adapters on nnx models: the same call, the same numbers as on linen, under every nnx transformation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError

UC = lora.UCLoRA(rank=2, bases=3, widths=(8,))
SITES = r".*/(qkv|proj)"
X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
C = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


class Map(nnx.Module):
    """Two layers whose output is the condition [B, 8]."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, c):
        return self.second(nnx.silu(self.first(c)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(6, 8, rngs=rngs)
        self.proj = nnx.Linear(8, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.proj(nnx.silu(self.qkv(x)))


class Rematerialised(Block):
    @nnx.remat  # decorated: traced once for all instances
    def __call__(self, x):
        return super().__call__(x)


class Net(nnx.Module):
    """Called as (x [B, L, 6], c [B, 3]): the embedding `map`, and blocks in a list or stacked in a scan."""

    def __init__(self, block=Block, stacked=False, broadcast=False):
        rngs = nnx.Rngs(0)
        self.map = Map(rngs)
        self.stacked = stacked
        self.axes = nnx.StateAxes({nnx.Param: 0, ...: None}) if broadcast else 0
        if stacked:
            self.blocks = nnx.vmap(block, in_axes=0)(nnx.Rngs(0).split(2))
        else:
            self.blocks = nnx.List([block(rngs), block(rngs)])

    def __call__(self, x, c):
        x = x + self.map(c)[:, None, :6]
        if self.stacked:
            axes = (self.axes, nnx.Carry)
            scan = nnx.scan(lambda block, x: block(x), in_axes=axes, out_axes=nnx.Carry)
            return scan(self.blocks, x)
        for block in self.blocks:
            x = block(x)
        return x


def randomised(model, scale=0.4):
    """The model, with no zero in its adapters that hides a mistake."""
    rng = np.random.default_rng(2)
    random = jax.tree.map(
        lambda v: scale * rng.standard_normal(v.shape).astype(np.float32), lora.adapter_tree(model)
    )
    lora.update_adapters(model, random)
    return model


def attached(net, condition="map", adapter=UC, **settings):
    return lora.attach(net, sites=SITES, adapter=adapter, condition=condition, **settings)


@nnx.jit
def run(model, *inputs):
    return model(*inputs)


@nnx.jit
def gradients(model, *inputs):
    loss = lambda model, *inputs: jnp.square(model(*inputs)).mean()  # noqa: E731
    return nnx.grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model, *inputs)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_a_clone_starts_as_the_base_and_the_model_stays_as_it_was():
    net = Net()
    before = nnx.to_flat_state(nnx.state(net))
    wrapped = attached(net)
    np.testing.assert_array_equal(wrapped(X, C), net(X, C))
    assert isinstance(wrapped, Net)
    assert (type(net), type(net.blocks[0].qkv)) == (Net, nnx.Linear)
    own = dict(nnx.to_flat_state(nnx.state(wrapped, nnx.Not(lora.LoRAParam))))
    assert list(own) == [path for path, _ in before]
    for path, variable in before:
        np.testing.assert_array_equal(own[path].get_value(), variable.get_value())
    assert lora.list_sites(lora.adapter_tree(wrapped)) == [
        *("blocks/0/proj", "blocks/0/qkv", "blocks/1/proj", "blocks/1/qkv")
    ]
    starts = {path: value for path, value in nnx.to_flat_state(nnx.state(wrapped))}
    assert not np.array_equal(
        starts["blocks", 0, "qkv", "lora", "down", "kernel"].get_value(),
        starts["blocks", 1, "qkv", "lora", "down", "kernel"].get_value(),
    )


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x, c):
        x = nn.Conv(6, (3, 3), strides=2, padding="VALID", name="conv")(x)
        x = nn.DenseGeneral((2, 4), name="heads")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="merged")(x)
        return nn.Dense(3, use_bias=False, name="last")(x)


class NNXLayers(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.heads = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.merged = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)
        self.last = nnx.Linear(5, 3, use_bias=False, rngs=rngs)

    def __call__(self, x, c):
        return self.last(self.merged(self.heads(self.conv(x))))


@pytest.mark.parametrize(
    ("adapter", "condition"),
    [
        (UC, C),
        (lora.TimeLoRA(rank=2, bases=3, num_timesteps=9), np.array([0.0, 2.5, 4.0, 9.0])),
        (lora.ClassLoRA(rank=2, num_classes=3), np.array([0, 2, 1, 1])),
        (
            lora.SumOfAdapters({"uc": UC, "class": lora.ClassLoRA(rank=1, num_classes=3)}),
            {"uc": C, "class": np.array([0, 2, 1, 1])},
        ),
    ],
)
def test_every_adapter_on_every_layer_gives_what_linen_gives(adapter, condition):
    """The trees are the same, so linen's parameters serve the nnx model."""
    x = np.random.default_rng(3).normal(size=(4, 5, 5, 2)).astype(np.float32)
    settings = {"sites": ".*", "adapter": adapter, "condition": lambda x, c: c}
    linen = lora.attach(LinenLayers(), **settings)
    model = lora.attach(NNXLayers(nnx.Rngs(0)), inputs=(x, condition), **settings)
    tree = lora.adapter_tree(randomised(model))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(lora.LoRAParam)))
    params = lora.merge(jax.tree.map(jnp.asarray, state), tree)
    close(run(model, x, condition), jax.jit(linen.apply)({"params": params}, x, condition))
    weights = lora.composition_weights(model, x, condition)
    expected = jax.jit(lambda *a: lora.composition_weights(linen, *a))(
        {"params": params}, x, condition
    )
    close(weights, expected)


def test_gradients_reach_every_adapter_leaf_and_training_moves_them_alone():
    model = randomised(attached(Net()))
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(gradients(model, X, C)))
    assert set(map(str, flat)) == {
        str(path) for path, _ in nnx.to_flat_state(nnx.state(model, lora.LoRAParam))
    }
    assert all(np.abs(v).max() > 0 for v in flat.values())


def test_jit_closures_split_and_merge_give_the_same():
    model = randomised(attached(Net()))
    expected = model(X, C)
    close(run(model, X, C), expected)
    close(jax.jit(lambda x, c: model(x, c))(X, C), expected)  # closes over the model
    definition, state = nnx.split(model)
    close(jax.jit(lambda state, x, c: nnx.merge(definition, state)(x, c))(state, X, C), expected)
    single = jax.vmap(lambda x, c: model(x[None], c[None])[0])(X, C)
    close(single, expected)
    assert not [k for k in vars(model.blocks[0].qkv) if k == "lora_conditions"]  # gone after a call


@pytest.mark.parametrize("condition", ["map", "function"])
def test_remat_sees_the_condition_of_each_call(condition):
    given = "map" if condition == "map" else (lambda x, c: jnp.tanh(c))
    plain, remat = (attached(Net(block), given, inputs=(X, C)) for block in (Block, Rematerialised))
    randomised(plain), randomised(remat)
    close(remat(X, C + 1), run(plain, X, C + 1))
    for c in (C, 1 - C):  # the second call reuses the first one's trace
        close(run(remat, X, c), run(plain, X, c))
    close(nnx.to_pure_dict(gradients(remat, X, C)), nnx.to_pure_dict(gradients(plain, X, C)))


@pytest.mark.parametrize("broadcast", [False, True])
def test_stacked_blocks_in_a_scan_have_an_adapter_each(broadcast):
    """The scan of two stacked blocks is the loop over the two; other state is stacked, or broadcast."""
    stacked = randomised(attached(Net(stacked=True, broadcast=broadcast)))
    assert stacked.blocks.qkv.lora["down"]["kernel"].shape == (2, 6, 6)
    loop = attached(Net())
    for i, block in enumerate(loop.blocks):
        copy = jax.tree.map(lambda v, i=i: v[i], nnx.state(stacked.blocks))
        nnx.update(block, copy)
    nnx.update(loop.map, nnx.state(stacked.map))
    close(run(stacked, X, C), run(loop, X, C))
    found = nnx.to_pure_dict(gradients(stacked, X, C))["blocks"]
    expected = nnx.to_pure_dict(gradients(loop, X, C))["blocks"]
    close(found, jax.tree.map(lambda a, b: np.stack([a, b]), expected[0], expected[1]))


def test_fresh_stacked_adapters_differ():
    model = attached(Net(stacked=True))
    np.testing.assert_array_equal(model(X, C), Net(stacked=True)(X, C))
    down = model.blocks.qkv.lora["down"]["kernel"].get_value()
    assert np.abs(down[0] - down[1]).max() > 0.1


def test_several_adapters_add_up_each_with_its_sites_condition_and_scale():
    def outputs(scale, names):
        model = Net()
        if "style" in names:
            model = lora.attach(model, sites=".*/qkv", adapter=UC, condition="map", name="style")
        if "time" in names:
            time = lora.TimeLoRA(rank=1, bases=2, num_timesteps=9, scale=scale)
            condition = lambda x, c: jnp.abs(c[:, 0])  # noqa: E731
            model = lora.attach(
                model, sites=".*/proj", adapter=time, condition=condition, name="time"
            )
        tree = lora.adapter_tree(model)
        lora.update_adapters(model, jax.tree.map(lambda v: np.full(v.shape, 0.1, np.float32), tree))
        assert lora.list_sites(tree) == sorted(
            f"blocks/{i}/{s}"
            for i in (0, 1)
            for n, s in (("style", "qkv"), ("time", "proj"))
            if n in names
        )
        return model

    model = outputs(0.5, ("style", "time"))
    weights = lora.composition_weights(model, X, C)
    one = outputs(1.0, ("time",))
    full = lora.composition_weights(one, X, C)
    close(weights["blocks/0/proj"]["time",], 0.5 * np.asarray(full["blocks/0/proj"]["time",]))
    assert set(weights["blocks/0/qkv"]) == {("style",)}
    without = run(outputs(0.0, ("style", "time")), X, C)
    close(without, run(outputs(1.0, ("style",)), X, C))
    assert np.abs(run(model, X, C) - without).max() > 1e-3


def test_a_condition_per_token():
    """Token k of [B, tokens, E] does what a sequence with its condition alone does there."""
    tokens = np.random.default_rng(4).normal(size=(4, 5, 3)).astype(np.float32)
    model = attached(NetOfTokens(), lambda x, c: c, inputs=(X, tokens))
    randomised(model)
    found = run(model, X, tokens)
    for k in range(5):
        close(found[:, k], run(model, X, tokens[:, k])[:, k])


class NetOfTokens(nnx.Module):
    def __init__(self):
        self.qkv = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

    def __call__(self, x, c):
        return self.qkv(x)


def test_parameters_are_made_by_the_first_call_where_their_size_is_unknown():
    model = attached(Net(), lambda x, c: c)
    assert lora.adapter_tree(model) == {}
    with pytest.raises(UserError, match="no parameters yet.*inputs="):
        jax.jit(lambda x, c: model(x, c))(X, C)
    np.testing.assert_array_equal(model(X, C), Net()(X, C))
    assert len(lora.list_sites(lora.adapter_tree(model))) == 4
    same = attached(Net(), lambda x, c: c, inputs=(X, C))
    jax.tree.map(np.testing.assert_array_equal, lora.adapter_tree(same), lora.adapter_tree(model))


class Tangled(nnx.Module):
    """Its condition `map` runs inside of a remat region, or after the site; or it has another `lora`."""

    def __init__(self, case):
        rngs = nnx.Rngs(0)
        self.case = case
        self.map = nnx.Linear(3, 6, rngs=rngs)
        self.qkv = nnx.Linear(6, 6, rngs=rngs)
        if case == "name":
            self.lora = nnx.Linear(6, 6, rngs=rngs)
        if case == "groups":
            self.qkv = nnx.Conv(6, 6, (1,), feature_group_count=2, rngs=rngs)

    def __call__(self, x, c):
        if self.case == "late":
            return self.qkv(x) + self.map(c)[:, None]
        region = nnx.remat(lambda self, c: self.map(c)) if self.case == "remat" else Tangled.embed
        return self.qkv(x + region(self, c)[:, None])

    def embed(self, c):
        return self.map(c)

    def part(self, x):
        return self.qkv(x)


@pytest.mark.parametrize(
    ("case", "settings", "words"),
    [
        ("", {"sites": "nothing"}, "matches no layer. Candidates: map, qkv"),
        ("", {"condition": "nothing"}, "'nothing' matches no submodule. Submodules: map, qkv"),
        ("", {"sites": "("}, "not a regular expression"),
        ("name", {}, "has an attribute 'lora"),
        ("groups", {}, "'qkv' is a Conv with feature groups"),
        ("late", {}, "'qkv' was reached before"),
        ("remat", {}, "inside an nnx.scan, nnx.remat, nnx.jit or nnx.vmap region"),
        ("", {"condition": lambda x, c: None}, "function returned None"),
    ],
)
def test_what_does_not_work_is_one_sentence(case, settings, words):
    settings = {"sites": "qkv", "condition": "map", "adapter": UC, **settings}
    with pytest.raises(UserError, match=words):
        lora.attach(Tangled(case), **settings)(X, C)


def test_other_mistakes_are_one_sentence():
    settings = {"sites": "qkv", "condition": "map", "adapter": UC}
    model = lora.attach(Tangled(""), **settings)
    with pytest.raises(UserError, match="has adapters already, at 'qkv'.* name of its own"):
        lora.attach(model, **settings)
    with pytest.raises(UserError, match="several adapters, of which one has no name"):
        lora.attach(model, name="second", **settings)
    with pytest.raises(UserError, match="outside of a call of the adapted model"):
        model.part(X)
    with pytest.raises(UserError, match="'map' is .*|is a Map; adapters go beside Linear"):
        lora.attach(Net(), sites="map", condition=lambda x, c: c, adapter=UC)
    with pytest.raises(UserError, match="is in one of them alone"):
        lora.update_adapters(model, {"qkv": {"lora": {}}})
    wide = lora.attach(Tangled(""), sites="qkv", condition="map", adapter=UC.clone(rank=3))
    with pytest.raises(UserError, match="do not fit the model: qkv/lora/.* has the shape"):
        lora.update_adapters(model, lora.adapter_tree(wide))
    for remat in (attached(Net(Rematerialised)), attached(Net(Rematerialised))):
        with pytest.raises(UserError, match="hides its composition weights"):
            lora.composition_weights(remat, X, C)
