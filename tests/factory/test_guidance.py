"""Guidance and adapters' scale of a config's network, against calls of the network itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check
from lora_diffusion_jax.factory.guidance import build_bind
from lora_diffusion_jax.factory.networks import build_denoiser, resolved
from lora_diffusion_jax.factory.objectives import build_sampler, count_evaluations
from lora_diffusion_jax.paths import path_of
from tests.small import fast_jit, random_variables, small_config

X = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
LABELS = jnp.eye(3)[jnp.array([0, 2])]
CONDITIONAL = {
    **{"class_conditional": True, "data__num_classes": 3, "model__label_dropout": 0.1},
    **{"model__channel_mult": (1,), "model__attn_resolutions": (8,)},
}


def config_of(**changes):
    return small_config(**{**CONDITIONAL, **changes})


@pytest.fixture(scope="module")
def network():
    """A conditional network with UC-LoRA and random weights, whose adapters matter."""
    denoiser = build_denoiser(config_of())
    variables = random_variables(denoiser, X, jnp.float32(1.0), LABELS)

    def grown(path, value):
        return 50 * value if "lora" in path_of(path) and "up" in path_of(path) else value

    return denoiser, jax.tree_util.tree_map_with_path(grown, variables)


def denoised(network, sigma=1.0, labels=LABELS, **changes):
    """D(x; sigma) as a sampler of this config sees it."""
    denoiser, variables = network
    bind = build_bind(config_of(**changes))
    sigma = jnp.asarray(sigma, jnp.float32)
    return fast_jit(lambda v, x, s: bind(denoiser, v, labels)(x, s))(variables, X, sigma)


def without_adapters(network, sigma=1.0):
    """The base's output, of the same weights."""
    base, _ = lora.split(network[1]["params"])
    denoiser = build_denoiser(config_of(lora__mode="baseline"))
    variables = {**network[1], "params": base}
    return fast_jit(denoiser.apply)(variables, X, jnp.float32(sigma), LABELS)


def test_adapters_of_scale_0_are_the_base(network):
    base, whole = without_adapters(network), denoised(network)
    assert np.abs(base - whole).max() > 0.05
    np.testing.assert_allclose(denoised(network, lora__scale=0.0), base, atol=1e-5)


def test_adapters_act_inside_their_interval(network):
    settings = {"lora__interval": (0.5, 2.0)}
    np.testing.assert_allclose(denoised(network, **settings), denoised(network), atol=1e-5)
    outside = denoised(network, 3.0, **settings)
    np.testing.assert_allclose(outside, without_adapters(network, 3.0), atol=1e-5)
    mixed = denoised(network, [1.0, 3.0], **settings)
    np.testing.assert_allclose(mixed[1], outside[1], atol=1e-5)


def test_a_scale_is_a_factor_of_what_an_adapter_adds():
    """On one layer, where the output is linear in it; a pattern chooses adapters."""
    net = lora.attach(
        Single(),
        sites="layer",
        adapter=lora.ADAPTERS["time_class"](2, 3, 10, 4),
        condition=two_conditions,
    )
    x, args = jnp.ones((2, 5)), (jnp.array([3.0, 7.0]), jnp.array([1, 2]))
    variables = random_variables(net, x, *args)
    run = fast_jit(net.apply)

    def added(scale, pattern=".*"):
        scaled = lora.with_scale(variables, jnp.asarray(scale), pattern)
        return run(scaled, x, *args) - run(lora.with_scale(variables, jnp.float32(0)), x, *args)

    whole = run(variables, x, *args) - run(lora.with_scale(variables, jnp.float32(0)), x, *args)
    np.testing.assert_allclose(added(1.0), whole, atol=1e-6)
    np.testing.assert_allclose(added(2.5), 2.5 * whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(added([2.0, 0.0]), whole * np.array([[2.0], [0.0]]), atol=1e-5)
    parts = added(0.0, ".*/time") + added(0.0, ".*/class")  # each leaves the other one
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert np.abs(added(0.0, ".*/time")).max() > 1e-3
    with pytest.raises(
        UserError, match=r"'x' matches none of the adapters: layer/lora/class, layer"
    ):
        lora.with_scale(variables, jnp.float32(0), "x")


def two_conditions(x, time, label):
    return {"time": time, "class": label}


class Single(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x, time, label):
        return nn.Dense(4, name="layer")(x)


def led(strong, weak, scale):
    return weak + scale * (strong - weak)


def test_classifier_free_guidance_is_two_calls(network):
    weak = denoised(network, labels=jnp.zeros_like(LABELS))
    expected = led(denoised(network), weak, 2.5)
    settings = {"guidance__name": "classifier_free", "guidance__scale": 2.5}
    np.testing.assert_allclose(denoised(network, **settings), expected, atol=2e-5)
    both = denoised(network, [1.0, 1.0], **settings)  # sigma per image
    np.testing.assert_allclose(both, expected, atol=2e-5)
    outside = denoised(network, guidance__interval=(2.0, 3.0), **settings)
    np.testing.assert_allclose(outside, denoised(network), atol=1e-5)


@pytest.mark.parametrize("weak_scale", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_guidance_by_scaled_adapters_is_two_calls(network, weak_scale):
    expected = led(denoised(network), denoised(network, lora__scale=weak_scale), 2.0)
    settings = {"guidance__name": "adapters", "guidance__scale": 2.0}
    got = denoised(network, guidance__lora_scale=weak_scale, **settings)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_autoguidance_by_another_network(network):
    denoiser, variables = network
    small = config_of(model__channels=4, lora__mode="baseline")
    weaker = build_denoiser(small)
    others = random_variables(weaker, X, jnp.float32(1.0), LABELS, seed=5)
    config = config_of(
        guidance__name="autoguidance", guidance__scale=2.0, guidance__workdir="somewhere"
    )
    bind = build_bind(config, weaker)
    pair = {"network": variables, "weaker": others}
    got = fast_jit(lambda v: bind(denoiser, v, LABELS)(X, jnp.float32(1.0)))(pair)
    weak = fast_jit(weaker.apply)(others, X, jnp.float32(1.0), LABELS)
    np.testing.assert_allclose(got, led(denoised(network), weak, 2.0), atol=2e-5)


def test_shared_weights_are_applied_to_pairs_in_one_call(network):
    """One program for both branches: the network is traced once, with twice the rows."""
    denoiser, variables = network
    rows = []

    class Spy:
        precond = denoiser.precond

        def apply(self, variables, x, *args, **options):
            rows.append(len(x))
            return denoiser.apply(variables, x, *args, **options)

    bind = build_bind(config_of(guidance__name="adapters", guidance__scale=2.0))
    sampler = build_sampler(config_of(sampler__num_steps=4), denoiser)
    jax.eval_shape(lambda v: sampler(bind(Spy(), v, LABELS), X), variables)
    assert rows == [4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 7),
        ({"guidance__name": "adapters", "guidance__scale": 2.0}, 14),
        ({"guidance__name": "adapters", "guidance__scale": 1.0}, 7),
        # EDM's grid of 4 levels is 80, 9.7, 0.47, 0.002; Heun's method is at the middle two twice.
        (
            {
                "guidance__name": "adapters",
                "guidance__scale": 2.0,
                "guidance__interval": (0.1, 1.0),
            },
            9,
        ),
    ],
)
def test_evaluations_of_the_guide_count(network, changes, expected):
    config = config_of(sampler__num_steps=4, **changes)
    sampler = build_sampler(config, network[0])
    assert count_evaluations(config, sampler, network[0]) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance__name": "more"}, "guidance.name is 'more'; it must be one of none"),
        ({"guidance__scale": 2.0}, "guidance.scale is 2, but guidance.name=none"),
        (
            {"guidance__name": "classifier_free", "model__label_dropout": 0.0},
            "with and without class",
        ),
        ({"guidance__name": "autoguidance"}, "needs guidance.workdir"),
        ({"guidance__name": "adapters", "lora__mode": "baseline"}, "has no adapters to scale"),
        ({"lora__scale": 0.5, "lora__mode": "baseline"}, "has no adapters to scale"),
        (
            {"lora__interval": (2.0, 1.0)},
            r"lora.interval is \(2.0, 1.0\); expected two noise levels",
        ),
        ({"guidance__interval": (1.0, 2.0, 3.0)}, "guidance.interval is .*expected two"),
        ({"lora__scaled": "(.*)*"}, "lora.scaled is .*repeats a group"),
    ],
)
def test_bad_settings_are_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        check(config_of(**changes))


def test_the_config_s_scale_is_for_sampling_alone():
    """The network itself, and so its training, has adapters of scale 1; sampling applies the factor once."""
    config = config_of(lora__scale=0.5)
    (attachment,) = build_denoiser(config).model.attachments
    assert attachment.adapter.scale == 1
    assert resolved(config)["lora"] == resolved(config_of())["lora"]


def test_half_a_scale_is_half_of_what_adapters_add(network):
    """To first order, at adapters so small that the network is linear in them."""
    denoiser, variables = network

    def small(path, value):
        added = "lora/up/" in path_of(path) or path_of(path).endswith("lora/bias")
        return 5e-3 * value if added else value

    small_network = denoiser, jax.tree_util.tree_map_with_path(small, variables)
    off, half, full = (denoised(small_network, lora__scale=k) for k in (0.0, 0.5, 1.0))
    change = full - off
    assert float(jnp.abs(change).max()) > 1e-4  # far above rounding
    np.testing.assert_allclose(half - off, 0.5 * change, atol=0.02 * float(jnp.abs(change).max()))
