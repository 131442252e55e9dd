"""Composition weights: the hat functions of TimeLoRA, ClassLoRA's labels, UC-LoRA's start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lora.composition import ConditionMLP, TimeTable, hat_functions
from tests.small import fast_apply, random_variables


def test_hat_functions_are_linear_interpolation():
    """Row t interpolates between the anchors: applied to anchor values v it is np.interp."""
    table = hat_functions(4000, 11)
    assert table.shape == (4001, 11)
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-6)
    anchors, values = np.arange(11) * 400, np.random.default_rng(0).normal(size=11)
    np.testing.assert_allclose(
        table @ values, np.interp(np.arange(4001), anchors, values), atol=1e-6
    )


def test_time_table_has_the_papers_size_and_interpolates_times():
    table = TimeTable(bases=11, num_timesteps=4000)
    params = jax.jit(table.init)(jax.random.key(0), jnp.zeros(1))
    assert lora.count(params) == 44_011
    got = fast_apply(table, params, jnp.array([0.0, 400.0, 600.0, 601.5, 4000.0]))
    expected = np.zeros((5, 11))
    expected[0, 0] = expected[1, 1] = expected[4, 10] = 1
    expected[2, 1:3] = 0.5
    expected[3, 1:3] = [1 - 201.5 / 400, 201.5 / 400]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_condition_mlp_starts_with_unit_gain():
    """Weights N(0, 1/fan_in), zero biases; GroupNorm makes each hidden layer's input unit size."""
    mlp = ConditionMLP(bases=18, widths=(128, 64))
    params = jax.jit(mlp.init)(jax.random.key(0), jnp.zeros((1, 512)))["params"]
    for name, fan_in in (("dense_0", 512), ("dense_1", 128), ("dense_out", 64)):
        assert np.std(params[name]["kernel"]) == pytest.approx(fan_in**-0.5, rel=0.06)
        assert not np.any(params[name]["bias"])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, time, labels):
        return nn.Dense(3, name="proj")(x)


def test_time_and_class_adapters_add_up():
    """W + sum_i omega_i(t) B_i A_i + B'_c A'_c, against numpy; ids and one-hot labels agree."""
    both = lora.SumOfAdapters(
        {
            "time": lora.TimeLoRA(rank=2, bases=3, num_timesteps=10),
            "class": lora.ClassLoRA(rank=2, num_classes=4),
        }
    )
    wrapped = lora.attach(
        Layer(),
        sites="proj",
        adapter=both,
        condition=lambda x, time, labels: {"time": time, "class": labels},
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    time, ids = jnp.array([5.0, 2.0]), jnp.array([3, 0])
    params = random_variables(wrapped, x, time, ids, scale=1.0)["params"]
    site = jax.tree.map(np.asarray, params["proj"])
    expected = x @ site["kernel"] + site["bias"]
    table = site["lora"]["time"]["composition"]["table"]
    for b in range(2):
        for part, omega in (("time", table[int(time[b])]), ("class", np.eye(4)[ids[b]])):
            pair = site["lora"][part]
            for i, weight in enumerate(omega):
                inner = slice(2 * i, 2 * i + 2)
                product = pair["down"]["kernel"][:, inner] @ pair["up"]["kernel"][inner]
                expected[b] += weight * (x[b] @ product)
    for labels in (ids, jax.nn.one_hot(ids, 4)):
        got = fast_apply(wrapped, {"params": params}, x, time, labels)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    with pytest.raises(UserError, match="one condition per adapter"):
        lora.attach(
            Layer(), sites="proj", adapter=both, condition=lambda x, t, c: {"time": t}
        ).apply({"params": params}, x, time, ids)  # eager: it fails before it computes


def test_a_mixture_of_classes_mixes_their_pairs():
    """The layer's change under a mixture is that mixture of its changes under the classes."""
    wrapped = lora.attach(
        Layer(),
        sites="proj",
        adapter=lora.ClassLoRA(rank=2, num_classes=3),
        condition=lambda x, time, labels: labels,
    )
    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    mixture, none = np.float32([0.5, 0.2, 0.3]), np.zeros(3, np.float32)
    labels = np.stack([*np.eye(3, dtype=np.float32), mixture, none])
    x[:] = x[0]
    variables = random_variables(wrapped, x, None, labels, scale=1.0)
    found = np.asarray(fast_apply(wrapped, variables, x, None, labels))
    changes = found[:4] - found[4]
    np.testing.assert_allclose(changes[3], np.tensordot(mixture, changes[:3], 1), atol=1e-5)
    assert np.abs(changes).max() > 0.1
    layer = variables["params"]["proj"]
    np.testing.assert_allclose(found[4], x[0] @ layer["kernel"] + layer["bias"], atol=1e-5)
