"""Adapters on our layers and on flax's own, attached from outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from tests.small import ConditionedNet, fast_apply, random_variables

SITES = r".*/(qkv|conv|query|key|value|out|proj)"
ADAPTER = lora.UCLoRA(rank=2, bases=3, widths=(16, 8))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, 5)).astype(np.float32)
    return x, rng.normal(size=(2, 7)).astype(np.float32)


def adapted(condition="map", sites=SITES, remat=False, adapter=ADAPTER):
    net = ConditionedNet(remat)
    return lora.attach(net, sites=sites, adapter=adapter, condition=condition)


@pytest.fixture(scope="module")
def variables(inputs):
    """Of `adapted()`, with nothing at its start: no zero hides a mistake."""
    return random_variables(adapted(), *inputs, scale=0.4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": ConditionedNet}, "module .* the class ConditionedNet; .* call it to make one"),
        (
            {"module": lambda x: x},
            "module .* of type function; expected an instance of a linen module or of an nnx",
        ),
        ({"adapter": lora.UCLoRA}, "adapter .* the class UCLoRA; .* call it to make one"),
        ({"adapter": None}, "adapter .* of type NoneType"),
        ({"adapter": lora.UCLoRA(widths=4)}, "widths are 4; expected a tuple"),
        ({"adapter": lora.UCLoRA(widths="48")}, "widths are '48'; expected a tuple"),
        ({"adapter": lora.SumOfAdapters({})}, "SumOfAdapters has other things"),
        ({"adapter": lora.SumOfAdapters(ADAPTER)}, "SumOfAdapters has other things"),
        ({"adapter": lora.SumOfAdapters({"a": lora.UCLoRA})}, "SumOfAdapters has other things"),
        ({"sites": None}, "sites .* of type NoneType; expected one regular expression"),
        ({"sites": ["qkv"]}, "sites .* of type list"),
        ({"condition": 3}, "condition .* of type int; expected a regular expression"),
        ({"condition": None}, "condition .* of type NoneType"),
        ({"name": "a/b"}, "name .* is 'a/b'; expected a word"),
        ({"seed": 1}, "a seed for a linen module"),
        ({"adapter": lora.UCLoRA(scale="2")}, "scale is '2'; it must be a number"),
        ({"adapter": lora.UCLoRA(scale=float("nan"))}, "scale is nan; it must be finite"),
    ],
)
def test_arguments_of_another_kind_are_one_sentence(changes, words):
    good = {"module": ConditionedNet(), "sites": SITES, "adapter": ADAPTER, "condition": "map"}
    lora.attach(**good)
    with pytest.raises(UserError, match=words):
        lora.attach(**{**good, **changes})


def shapes_of(module, *args):
    """The variables' shapes; nothing is compiled or run."""
    return jax.eval_shape(module.init, jax.random.key(0), *args)


def test_base_keeps_names_values_and_output(inputs):
    net, wrapped = (
        ConditionedNet(),
        adapted(sites=r".*/(conv|query)"),
    )  # initialisers compile slowly

    @jax.jit
    def run(key):
        bare, with_lora = net.init(key, *inputs), wrapped.init(key, *inputs)
        return bare, with_lora, net.apply(bare, *inputs), wrapped.apply(with_lora, *inputs)

    bare, with_lora, expected, found = run(jax.random.key(3))
    base, _ = lora.split(with_lora["params"])
    jax.tree.map(np.testing.assert_array_equal, base, bare["params"])
    np.testing.assert_array_equal(found, expected)
    assert np.ptp(expected) > 0


def test_sites_are_the_layers_whose_path_matches(inputs):
    base, adapters = lora.split(shapes_of(adapted(), *inputs)["params"])
    assert base == shapes_of(ConditionedNet(), *inputs)["params"]
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
    tree = shapes_of(adapted(sites=r".*/qkv"), *inputs)["params"]["block"]["qkv"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, tree)
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
    params = random_variables(wrapped, x, omega, scale=0.5)["params"]
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


def test_gradient_reaches_every_adapter_leaf_under_jit_and_remat(inputs, variables):
    """Off the zero start every leaf has a gradient, and remat changes none of them."""

    def gradients(remat):
        wrapped = adapted(remat=remat)
        loss = lambda params: jnp.square(wrapped.apply({"params": params}, *inputs)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(variables["params"])

    plain, rematerialised = gradients(False), gradients(True)
    flat = traverse_util.flatten_dict(lora.split(plain)[1])
    # The key's bias shifts all logits of a query alike, which softmax ignores: true gradient zero.
    assert all(np.abs(v).max() > 0 for k, v in flat.items() if k[-2:] != ("lora", "bias"))
    # One scale for all: a key's bias has the true gradient zero, so that its values are rounding.
    atol = 1e-5 * max(np.abs(v).max() for v in flat.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), plain, rematerialised)


def test_condition_function_equals_tap(inputs, variables):
    """A function that computes what the tapped module gives is the same condition."""
    layer = variables["params"]["map"]
    given = adapted(condition=lambda x, c: c @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(
        fast_apply(given, variables, *inputs),
        fast_apply(adapted(), variables, *inputs),
        rtol=1e-5,
        atol=1e-5,
    )


def test_condition_decides_and_bypass_is_the_base(inputs, variables):
    x, condition = inputs
    wrapped = adapted()
    base = {"params": lora.split(variables["params"])[0]}
    np.testing.assert_array_equal(
        fast_apply(wrapped.clone(enabled=False), variables, *inputs),
        fast_apply(ConditionedNet(), base, *inputs),
    )
    same = fast_apply(wrapped, variables, x, np.stack([condition[0]] * 2))
    assert np.abs(same[1] - fast_apply(wrapped, variables, *inputs)[1]).max() > 1e-3


def test_one_condition_row_serves_the_batch(inputs):
    x, condition = inputs
    wrapped = adapted(condition=lambda x, c: c)
    params = random_variables(wrapped, x, condition[:1])
    np.testing.assert_allclose(
        fast_apply(wrapped, params, x, condition[:1]),
        fast_apply(wrapped, params, x, np.repeat(condition[:1], 2, axis=0)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_nested_in_another_module_and_called_twice(inputs, variables):
    """Inside a larger module, and with the adapted module shared between two calls."""

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x, condition):
            return self.inner(x, condition) + self.inner(2 * x, condition)

    outer = Outer(adapted())
    tree = shapes_of(outer, *inputs)["params"]
    assert set(tree["inner"]) == {"block", "head", "map"}
    x, condition = inputs
    once = [fast_apply(adapted(), variables, scale * x, condition) for scale in (1, 2)]
    found = fast_apply(outer, {"params": {"inner": variables["params"]}}, x, condition)
    np.testing.assert_allclose(found, sum(once), rtol=1e-5, atol=1e-5)


def test_a_layer_called_twice_has_one_adapter():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, c):
            layer = nn.Dense(5, name="qkv")
            return layer(layer(x))

    wrapped = lora.attach(Shared(), sites="qkv", adapter=ADAPTER, condition=lambda x, c: c)
    x, c = jnp.ones((2, 5)), jnp.ones((2, 3))
    variables = random_variables(wrapped, x, c)
    assert lora.list_sites(variables["params"]) == ["qkv"]
    assert fast_apply(wrapped, variables, x, c).shape == (2, 5)


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
        (
            {"condition": lambda x, c: jnp.ones((3, 8))},
            ["leading shape (3,), the layer's input (2, 4, 4)"],
        ),
    ],
)
def test_mistakes_are_named(inputs, change, words):
    with pytest.raises(UserError) as error:
        shapes_of(adapted(**change), *inputs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rank_one_with_one_basis_works(inputs):
    """The reference refuses rank * bases = 1."""
    wrapped = adapted(adapter=lora.UCLoRA(rank=1, bases=1, widths=()))
    assert shapes_of(wrapped, *inputs)["params"]["block"]["qkv"]["lora"]["down"][
        "kernel"
    ].shape == (5, 1)


def test_attaching_twice_gives_equal_modules():
    """Equal modules share compilations where a module is a static argument of jit."""
    assert adapted() == adapted()
    assert adapted() != adapted(adapter=lora.UCLoRA(rank=2, bases=4, widths=(16, 8)))


@pytest.mark.parametrize(
    ("adapter", "condition"),
    [
        (lora.UCLoRA(rank=2, bases=3, widths=(8,)), jnp.linspace(-1, 1, 20).reshape(4, 5)),
        (lora.TimeLoRA(rank=2, bases=3, num_timesteps=9), jnp.array([0.0, 2.5, 4.0, 9.0])),
        (lora.ClassLoRA(rank=2, num_classes=3), jnp.array([0, 2, 1, 1])),
        (lora.ClassLoRA(rank=2, num_classes=3), jnp.eye(4, 3)),
    ],
)
@pytest.mark.parametrize("inner", [(), (3,)])
def test_single_inputs_under_vmap_give_the_rows_of_a_batch(adapter, condition, inner):
    wrapped = lora.attach(Layer(), sites="qkv", adapter=adapter, condition=lambda x, c: c)
    x = jax.random.normal(jax.random.key(0), (4, *inner, 6))
    variables = random_variables(wrapped, x, condition)
    batch = wrapped.apply(variables, x, condition)
    single = jax.vmap(lambda x, c: wrapped.apply(variables, x, c))(x, condition)
    assert single.shape == batch.shape
    np.testing.assert_allclose(single, batch, rtol=1e-5, atol=1e-5)  # sums in another order


class Layer(nn.Module):
    name_of_layer: str = "qkv"

    @nn.compact
    def __call__(self, x, condition):
        return nn.Dense(5, name=self.name_of_layer)(x)


class Stack(nn.Module):
    """Three layers `qkv` in nn.scan, which may collect what they sow."""

    collect: bool

    @nn.compact
    def __call__(self, x, condition):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(6, name="qkv")(x), None

        axes = {"params": 0} | ({"intermediates": 0} if self.collect else {})
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(name="stack")(x, None)[0]


def test_composition_weights_in_a_scan_are_collected_or_missed():
    x, c = jnp.ones((4, 6)), jnp.ones((4, 5))
    settings = {"sites": ".*/qkv", "adapter": lora.UCLoRA(rank=2, bases=3, widths=(8,))}
    for collect in (True, False):
        wrapped = lora.attach(Stack(collect), condition=lambda x, c: c, **settings)
        variables = random_variables(wrapped, x, c)
        if collect:
            (omega,) = lora.composition_weights(wrapped, variables, x, c).values()
            assert omega.shape == (3, 4, 3)
        else:
            with pytest.raises(UserError, match="'stack/qkv' recorded no .*'intermediates': 0"):
                lora.composition_weights(wrapped, variables, x, c)


def test_what_cannot_be_attached_is_one_sentence():
    x, c = jnp.ones((4, 6)), jnp.ones((4, 5))
    settings = {"adapter": lora.UCLoRA(rank=2, bases=3, widths=(8,)), "sites": ".*/(qkv|lora)"}
    once = lora.attach(Layer(), condition=lambda x, c: c, **settings)
    with pytest.raises(UserError, match="has adapters already, at .* name of its own"):
        lora.attach(once, condition=lambda x, c: c, **settings)
    twice = lora.attach(once, condition=lambda x, c: c, name="second", **settings)
    named = lora.attach(Layer("lora"), condition=lambda x, c: c, **settings)
    none = lora.attach(Layer(), condition=lambda x, c: None, **settings)
    tokens = jnp.ones((4, 2, 5))
    for module, condition, words in (
        (named, c, "The base has a submodule 'lora'"),
        (none, c, "condition function returned None"),
        (once, tokens, r"has the leading shape \(4, 2\), the layer's input \(4,\)"),
        (twice, c, "several adapters, of which one has no name"),
    ):
        with pytest.raises(UserError, match=words):
            jax.eval_shape(module.init, jax.random.key(0), x, condition)
    variables = random_variables(once, x, c)
    with pytest.raises(
        UserError, match="LoRA site 'qkv' got a condition or an input of a different width"
    ):
        once.apply(variables, x, jnp.ones((4, 7)))
