"""Norms of updates against products written out; losses without adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.analysis import updates
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.diffusion.precond import EDM, Denoiser
from lora_diffusion_jax.paths import ADAPTER
from tests.small import ConditionedNet, fast_apply, fast_jit, random_variables

SITES = r".*/(qkv|conv|query|out|proj)"
SUM = lora.SumOfAdapters(
    {"uc": lora.UCLoRA(rank=2, bases=3, widths=(8,)), "class": lora.ClassLoRA(num_classes=7)}
)
RNG = np.random.default_rng(0)
INPUTS = (RNG.normal(size=(2, 4, 4, 5)).astype("f"), RNG.normal(size=(2, 7)).astype("f"))


def both_conditions(x, condition):
    return {"uc": condition, "class": condition}


@pytest.fixture(scope="module")
def net():
    wrapped = lora.attach(ConditionedNet(), sites=SITES, adapter=SUM, condition=both_conditions)
    return wrapped, random_variables(wrapped, *INPUTS, scale=0.4)


def test_norm_of_a_pair_written_by_hand():
    down, up = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 5.0]])
    adapter = {"down": {"kernel": down}, "up": {"kernel": up}, "bias": np.full((2, 2), 9.0)}
    params = {"layer": {"kernel": np.array([[0.0, 6.0], [8.0, 0.0]]), ADAPTER: adapter}}
    # Two bases of rank 1: w_0 [[3, 4], [0, 0]] + w_1 [[0, 0], [0, 10]].
    weights = np.array([[1.0, 0.0], [0.0, -1.0], [2.0, 0.5]])
    found = updates.update_norms(params, {"layer": weights})
    np.testing.assert_allclose(found["layer"], [5, 10, 125**0.5], rtol=1e-6)
    assert updates.base_norms(params) == {"layer": 10.0}


def test_norms_of_all_layers_and_of_sums_are_those_of_the_products(net):
    wrapped, variables = net
    weights = lora.composition_weights(wrapped, variables, *INPUTS)
    found = updates.update_norms(variables["params"], weights)
    assert sorted(found) == lora.list_sites(variables["params"])
    for site, norms in found.items():
        layer = variables["params"]
        for part in site.split("/"):
            layer = layer[part]
        for row in range(2):
            delta = 0.0
            for (name,), omega in weights[site].items():
                down, up = (np.asarray(layer[ADAPTER][name][k]["kernel"]) for k in ("down", "up"))
                rank, omega = down.shape[-1] // omega.shape[-1], np.asarray(omega[row])
                for i, weight in enumerate(omega):
                    inner = slice(i * rank, (i + 1) * rank)
                    delta += weight * np.tensordot(down[..., inner], up[inner], axes=1)
            assert norms[row] == pytest.approx(np.sqrt(np.square(delta).sum()), rel=1e-5)


def test_without_any_adapter_the_base_is_left(net):
    wrapped, variables = net
    base, _ = lora.split(variables["params"])
    expected = fast_apply(ConditionedNet(), {"params": base}, *INPUTS)
    off = updates.without_adapters(variables["params"])
    found = fast_apply(wrapped, {"params": off}, *INPUTS)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(fast_apply(wrapped, variables, *INPUTS) - expected).max() > 0.01


def test_ablation_takes_one_site_at_a_time(net):
    wrapped, variables = net
    sites = lora.list_sites(variables["params"])
    at = sites.index("block/conv")
    silent = jax.tree.map(lambda leaf: leaf, variables)  # a copy of the dictionaries
    for adapter in silent["params"]["block"]["conv"][ADAPTER].values():
        adapter["up"]["kernel"] = jnp.zeros_like(adapter["up"]["kernel"])
        if "bias" in adapter:
            adapter["bias"] = jnp.zeros_like(adapter["bias"])
    calls = []
    apply = fast_jit(lambda variables: wrapped.apply(variables, *INPUTS))
    whole, off, none = updates.ablate(apply, silent, lambda: calls.append(None))
    assert len(calls) == len(sites) + 2
    np.testing.assert_array_equal(off[at], whole)  # an adapter that adds zero: to the bit
    assert all(k == at or np.abs(off[k] - whole).max() > 1e-3 for k in range(len(sites)))
    others = [site for site in sites if site != "block/qkv"]  # no adapter there, by the pattern
    alone = lora.attach(
        ConditionedNet(), sites="|".join(others), adapter=SUM, condition=both_conditions
    )
    expected = fast_apply(alone, silent, *INPUTS)
    np.testing.assert_allclose(off[sites.index("block/qkv")], expected, rtol=1e-5, atol=1e-5)
    base = fast_apply(ConditionedNet(), {"params": lora.split(silent["params"])[0]}, *INPUTS)
    np.testing.assert_array_equal(none, base)


class Zero(nn.Module):
    """F = 0: the denoiser is c_skip x."""

    def __call__(self, x, *rest):
        return jnp.zeros_like(x)


def test_losses_by_level_are_the_weighted_errors_of_the_same_noise():
    images, noise = RNG.normal(size=(2, 3, 4, 4, 1)).astype(np.float32)
    sigmas = np.array([0.1, 1.0, 10.0])
    loss = updates.loss_by_level(Objective(Denoiser(Zero(), EDM())), images, None, noise, sigmas)
    expected = []
    for sigma in sigmas:
        skip = 0.25 / (sigma**2 + 0.25)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        error = skip * (images + sigma * noise) - images
        expected.append(weight * np.square(error).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(loss({}), expected, rtol=1e-5)
