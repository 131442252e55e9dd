"""lora.adapter by config: each adapter on a whole network, and what it sees as its condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import (
    build_denoiser,
    bypass_lora,
    ignored_inputs,
    init_variables,
    variable_shapes,
)
from tests.small import fast_jit, random_variables, small_config

ADAPTERS = ("uc", "time", "class", "time_class", "static")
# Between them, the quick two have every part that the others have.
MARKED = {name: () if name in ("uc", "time_class") else pytest.mark.slow for name in ADAPTERS}
X = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
SIGMA = np.float32([0.3, 1.0, 5.0])
LABELS = np.eye(3, dtype=np.float32)


def config(adapter, **changes):
    """A class-conditional network with 3 classes and attention in its middle block alone."""
    return small_config(
        class_conditional=True,
        data__num_classes=3,
        model__attn_resolutions=(),
        lora__adapter=adapter,
        **{"lora__num_timesteps": 10, **changes},
    )


@functools.cache
def network(adapter):
    """The denoiser, and variables none of which is zero."""
    denoiser = build_denoiser(config(adapter))
    return denoiser, random_variables(denoiser, X, SIGMA, LABELS)


def composition(denoiser, variables, *args):
    """Composition weights of the site `qkv` of the middle block."""
    omegas = fast_jit(functools.partial(lora.composition_weights, denoiser))(variables, *args)
    return omegas["model/dec/4x4_in0/qkv"]


IMPROVED = {"model__name": "improved", "model__channels": 32, "precond__name": "iddpm"}
ADM = {"model__name": "adm", "model__channels": 64}


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        *(pytest.param(adapter, {}, marks=marks) for adapter, marks in MARKED.items()),
        pytest.param("time_class", IMPROVED, marks=pytest.mark.slow),
        pytest.param("uc", IMPROVED, marks=pytest.mark.slow),
    ],
)
def test_at_initialisation_the_network_equals_its_base_exactly(adapter, changes):
    changes = {"model__channel_mult": (1,), **changes} if changes else changes
    bare = config(adapter, lora__mode="baseline", **changes)
    found = {}
    for name, c in (("adapted", config(adapter, **changes)), ("bare", bare)):
        denoiser = build_denoiser(c)
        variables = fast_jit(functools.partial(init_variables, c, denoiser))(jax.random.key(3))
        images = fast_jit(denoiser.apply)(variables, X, SIGMA, LABELS)
        found[name] = lora.split(variables["params"])[0], images
    jax.tree.map(np.testing.assert_array_equal, found["adapted"], found["bare"])


def test_an_adapter_of_ones_own_is_a_value_of_the_config(monkeypatch):
    class Halves(lora.LowRankAdapter):
        def compose(self, condition):
            early = (condition < 5).astype(jnp.float32)
            return jnp.stack([early, 1 - early], axis=-1)

    monkeypatch.setitem(lora.ADAPTERS, "halves", Halves)
    c = config("halves", model__channel_mult=(1,))
    with pytest.raises(UserError, match=r"lora.CONDITIONS has .*Add what the adapter sees"):
        build_denoiser(c)
    monkeypatch.setitem(lora.CONDITIONS, "halves", ("time",))
    denoiser = build_denoiser(c)
    sigma = np.float32([0.002, 0.01, 80.0])  # the first, third and last tenth of ln sigma

    @fast_jit
    def omegas(key):
        variables = init_variables(c, denoiser, key)
        return lora.composition_weights(denoiser, variables, X, sigma, LABELS)

    for omega in omegas(jax.random.key(3)).values():
        np.testing.assert_array_equal(omega, [[1, 0], [1, 0], [0, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["uc", "time_class"])
def test_at_initialisation_only_lora_is_its_base_too(adapter):
    c = config(adapter, lora__mode="only_lora", model__channel_mult=(1,), **IMPROVED)
    denoiser = build_denoiser(c)

    @fast_jit
    def run(key):
        variables = init_variables(c, denoiser, key)
        variables["params"]["model"]["out_conv"]["kernel"] += 1.0  # zero at first
        apply = functools.partial(denoiser.apply, variables, X, SIGMA, LABELS)
        base = bypass_lora(denoiser).apply(variables, X, SIGMA, LABELS)
        return apply(), base

    found, base = run(jax.random.key(3))
    np.testing.assert_array_equal(found, base)


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        *((adapter, {}) for adapter in ADAPTERS),
        ("uc", IMPROVED),
        ("time", IMPROVED),
        ("class", ADM),
    ],
)
def test_the_base_of_each_mode(adapter, changes):
    """only_lora lacks the scale-and-shift, and, but for UC-LoRA, the mapping network; the sites stay."""

    def parts(mode):
        c = config(adapter, lora__mode=mode, model__augment_dim=0, **changes)
        params = variable_shapes(c, build_denoiser(c))["params"]
        base = traverse_util.flatten_dict(lora.split(params)[0], sep="/")
        return base, lora.list_sites(params)

    (whole, none), (adapted, sites), (only, same) = map(
        parts, ("baseline", "with_lora", "only_lora")
    )
    assert adapted == whole
    assert none == []
    attention = {
        p.removesuffix("/kernel") for p in whole if p.endswith(("qkv/kernel", "proj/kernel"))
    }
    assert set(sites) == set(same) == attention
    left_out = ("/affine/",) if adapter == "uc" else ("/affine/", "/map/")
    assert only == {k: v for k, v in whole.items() if not any(part in k for part in left_out)}
    assert len(only) < len(whole)


def test_what_a_network_does_not_depend_on_is_said():
    def said(adapter, **changes):
        changes = {"model__augment_dim": 0, **changes}
        return ignored_inputs(config(adapter, lora__mode="only_lora", **changes))

    assert said("uc") == said("time_class") == ""
    assert "depends on the class." in said("time")
    assert "depends on the noise level." in said("class")
    assert "depends on augmentation labels." in said("time_class", model__augment_dim=9)
    unconditional = small_config(lora__mode="only_lora", lora__adapter="time", model__augment_dim=0)
    assert ignored_inputs(unconditional) == ""
    assert ignored_inputs(config("time")) == ""


@pytest.mark.parametrize(
    "adapter", [pytest.param(adapter, marks=marks) for adapter, marks in MARKED.items()]
)
def test_gradients_reach_every_part_of_an_adapter(adapter):
    denoiser, variables = network(adapter)

    def loss(params):
        return jnp.square(denoiser.apply({"params": params}, X, SIGMA, LABELS)).sum()

    gradients = fast_jit(jax.grad(loss))(variables["params"])
    flat = traverse_util.flatten_dict(lora.split(gradients)[1], sep="/")
    assert flat
    for path, gradient in flat.items():
        if path.endswith(("down/kernel", "up/kernel", "table")):
            assert np.abs(gradient).max() > 0, path
        if path.endswith("table"):  # the rows beside the three times, and no others
            rows = np.abs(gradient).max(axis=1) > 0
            times = 10 * np.log(SIGMA / 0.002) / np.log(80 / 0.002)
            near = {int(np.floor(t)) for t in times} | {int(np.ceil(t)) for t in times}
            assert set(np.flatnonzero(rows)) == near


def test_time_is_linear_in_the_logarithm_of_edms_noise_level():
    """At the noise level of time k, the composition weights are row k of the learned table."""
    denoiser, variables = network("time")
    table = variables["params"]["model"]["dec"]["4x4_in0"]["qkv"]["lora"]["composition"]["table"]
    rows = [0, 4, 10]
    sigma = np.float32([0.002 * (80 / 0.002) ** (k / 10) for k in rows])
    found = composition(denoiser, variables, X, sigma, LABELS)
    np.testing.assert_allclose(found, table[np.array(rows)], atol=1e-4)
    beyond = composition(denoiser, variables, X, np.float32([1e-4, 80, 1e4]), LABELS)
    np.testing.assert_allclose(beyond, table[np.array([0, 10, 10])], atol=1e-6)


def test_times_of_iddpm_are_its_steps():
    denoiser = build_denoiser(
        config("time", precond__name="iddpm", precond__num_steps=11, lora__num_timesteps=10)
    )
    variables = random_variables(denoiser, X, SIGMA, LABELS)
    table = variables["params"]["model"]["dec"]["4x4_in0"]["qkv"]["lora"]["composition"]["table"]
    levels = denoiser.precond.levels()  # of the steps 10, 9, ..., 0, and zero
    found = composition(denoiser, variables, X, levels[np.array([10, 3, 0])], LABELS)
    np.testing.assert_allclose(found, table[np.array([0, 7, 10])], atol=1e-6)


def test_times_of_ddpm_are_its_timesteps_exactly():
    """The table has the process's T + 1 rows unless the config says otherwise."""
    denoiser = build_denoiser(
        config("time", precond__name="ddpm", precond__num_steps=301, lora__num_timesteps=0)
    )
    variables = random_variables(denoiser, X, SIGMA, LABELS)
    table = variables["params"]["model"]["dec"]["4x4_in0"]["qkv"]["lora"]["composition"]["table"]
    assert table.shape == (302, 3)
    steps = np.array([0, 7, 300])
    levels = np.float32(denoiser.precond.process.sigmas)[steps]
    np.testing.assert_array_equal(composition(denoiser, variables, X, levels, LABELS), table[steps])


def test_classes_weight_their_own_pairs():
    denoiser, variables = network("time_class")
    mixture = np.float32([[1, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])
    weights = composition(denoiser, variables, X, SIGMA, mixture)
    np.testing.assert_array_equal(weights[("class",)], mixture)
    assert weights[("time",)].shape == (3, 3)
    without = composition(denoiser, variables, X, SIGMA)
    np.testing.assert_array_equal(without[("class",)], np.zeros((1, 3)))


def test_without_a_condition_one_folded_network_serves_all_noise_levels_and_classes():
    denoiser, variables = network("static")
    params = variables["params"]
    site = params["model"]["dec"]["4x4_in0"]["qkv"]
    width = site["lora"]["down"]["kernel"].shape[1]
    kernel = site["kernel"] + site["lora"]["down"]["kernel"] @ site["lora"]["up"]["kernel"]
    ones = {path: np.ones(width // 2) for path in lora.list_sites(params)}  # of rank 2
    folded = lora.fold(params, ones)
    np.testing.assert_allclose(
        folded["model"]["dec"]["4x4_in0"]["qkv"]["kernel"], kernel, rtol=1e-5, atol=1e-6
    )
    adapted = fast_jit(denoiser.apply)(variables, X, SIGMA, LABELS)
    plain = fast_jit(bypass_lora(denoiser).apply)({"params": folded}, X, SIGMA, LABELS)
    np.testing.assert_allclose(adapted, plain, atol=1e-4)


def test_networks_of_equal_configs_are_equal():
    for adapter in ADAPTERS:
        assert build_denoiser(config(adapter)) == build_denoiser(config(adapter))
    assert build_denoiser(config("time")) != build_denoiser(config("time", lora__num_timesteps=9))


def test_parameters_of_the_papers_adapters():
    """TimeLoRA has a [T + 1, m] table and m pairs per site, ClassLoRA a pair per class; no bias."""
    paper = {"lora__rank": 4, "lora__bases": 11, "lora__num_timesteps": 4000}
    counts = {}
    for adapter in ("time", "time_class"):
        c = config(adapter, **paper)
        params = variable_shapes(c, build_denoiser(c))["params"]
        counts[adapter] = lora.count(lora.split(params)[1])
    width = 16  # of the middle block: qkv maps it to 48, proj to 16
    pairs = 4 * (width + 3 * width) + 4 * (width + width)  # of rank 4, at both sites
    assert counts["time"] == 2 * 44_011 + 11 * pairs
    assert counts["time_class"] == counts["time"] + 3 * pairs
