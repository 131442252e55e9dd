"""Adapters alone as files: this project's format, and PEFT's as its documentation describes it."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop import load_adapters, load_peft, save_adapters, save_peft
from tests.small import fast_apply, random_variables

X = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)


class Layers(nn.Module):
    """A Conv, and a Dense with its output in two axes (DenseGeneral)."""

    @nn.compact
    def __call__(self, x, condition):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.DenseGeneral((2, 4), name="heads")(x)
        return nn.DenseGeneral(5, axis=(-2, -1), name="merged")(x)


def adapted(adapter, condition=lambda x, c: c):
    return lora.attach(Layers(), sites=".*", adapter=adapter, condition=condition)


def plain(rank, use_bias=True):
    """Adapters without a condition."""
    adapter = lora.ClassLoRA(rank=rank, num_classes=1, use_bias=use_bias)
    return adapted(adapter, lambda x, c: jnp.zeros(1, int))


@pytest.fixture(scope="module")
def trained():
    """UC-LoRA under one condition: module, condition, parameters, and the composition weights there."""
    wrapped = adapted(lora.UCLoRA(rank=2, bases=3, widths=(8,), scale=0.5))
    condition = np.ones((1, 7), np.float32)
    variables = random_variables(wrapped, X, condition, scale=0.5)
    look = jax.jit(lambda v: lora.composition_weights(wrapped, v, X, condition))
    return wrapped, condition, variables["params"], look(variables)


def test_adapters_alone_come_back_bit_for_bit(trained, tmp_path):
    _, _, params, _ = trained
    _, adapters = lora.split(params)
    save_adapters(tmp_path / "adapters.safetensors", adapters)
    jax.tree.map(
        np.testing.assert_array_equal, load_adapters(tmp_path / "adapters.safetensors"), adapters
    )


def test_peft_files_compute_what_peft_documents(trained, tmp_path):
    """y = W x + b + alpha / r (lora_B (lora_A x) + lora_B.bias), for a layer alone and in torch's layouts."""
    wrapped, condition, params, omegas = trained
    base, adapters = lora.split(params)
    save_peft(tmp_path, adapters, omegas, conv1d="")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["conv", "heads", "merged"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]

    def delta(site, x):  # [.., in] of a Linear
        a, b, c = (
            tensors[f"base_model.model.{site}.{n}"]
            for n in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        )
        return scale * (x @ a.T @ b.T + c)

    conv = tensors["base_model.model.conv.lora_A.weight"]  # [r, in, kh, kw], as torch's Conv2d
    assert conv.shape == (config["r"], 3, 3, 3)
    hidden = jax.lax.conv_general_dilated(
        X.transpose(0, 3, 1, 2), conv, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    up = tensors["base_model.model.conv.lora_B.weight"][:, :, 0, 0]
    low_rank = np.einsum("brhw,or->bhwo", hidden, up)
    h = nn.Conv(6, (3, 3)).apply({"params": base["conv"]}, X)
    h = h + scale * (low_rank + tensors["base_model.model.conv.lora_B.bias"])
    for site, layer in (
        ("heads", nn.DenseGeneral((2, 4))),
        ("merged", nn.DenseGeneral(5, axis=(-2, -1))),
    ):
        y = layer.apply({"params": base[site]}, h)
        flat = h if site == "heads" else h.reshape(*h.shape[:-2], -1)
        h = y + delta(site, flat).reshape(y.shape)
    expected = fast_apply(wrapped, {"params": params}, X, condition)
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [6, 8])
def test_peft_files_come_back_as_adapters_without_a_condition(trained, tmp_path, rank):
    wrapped, condition, params, omegas = trained
    base, adapters = lora.split(params)
    save_peft(tmp_path, adapters, omegas, conv1d="")
    fresh = random_variables(plain(rank), X, None)["params"]
    loaded = lora.merge(base, load_peft(tmp_path, lora.split(fresh)[1]))
    np.testing.assert_allclose(
        fast_apply(plain(rank), {"params": loaded}, X, None),
        fast_apply(wrapped, {"params": params}, X, condition),
        rtol=1e-4,
        atol=1e-4,
    )


class Conv1d(nn.Module):
    """A 1-D convolution, and a DenseGeneral whose kernel has three axes as well."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3,), name="conv")(x)
        return x, nn.DenseGeneral(4, axis=(-2, -1), name="merged")(x)


def test_one_dimensional_convolutions_have_the_layout_of_conv1d(tmp_path):
    """lora_A [r, in, window] as torch's Conv1d, lora_B [out, r, 1]; and back again."""
    x = X[0]  # [B, length, channels]
    adapter = lora.ClassLoRA(rank=2, num_classes=1)
    wrapped = lora.attach(
        Conv1d(), sites=".*", adapter=adapter, condition=lambda x: jnp.zeros(1, int)
    )
    params = random_variables(wrapped, x)["params"]
    base, adapters = lora.split(params)
    ones = {"conv": np.ones(1), "merged": np.ones(1)}
    save_peft(tmp_path, adapters, ones, conv1d="conv")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    down = tensors["base_model.model.conv.lora_A.weight"]
    up = tensors["base_model.model.conv.lora_B.weight"]
    assert (down.shape, up.shape) == ((2, 3, 3), (6, 2, 1))
    assert tensors["base_model.model.merged.lora_A.weight"].shape == (2, 4 * 6)
    hidden = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 1), down, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
    )
    expected = nn.Conv(6, (3,)).apply({"params": base["conv"]}, x)
    expected += np.einsum("brl,or->blo", hidden, up[:, :, 0])
    found, _ = fast_apply(wrapped, {"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, adapters), adapters)


@pytest.mark.parametrize(("rslora", "factor"), [(False, 3.0), (True, 6.0)])
def test_alpha_is_read_as_peft_defines_it(tmp_path, rslora, factor):
    """alpha / r, with rsLoRA alpha / sqrt(r): 12 / 4 and 12 / 2."""
    fresh = lora.split(random_variables(plain(4, use_bias=False), X, None)["params"])[1]
    save_peft(
        tmp_path, fresh, {site: np.ones(1) for site in ("conv", "heads", "merged")}, conv1d=""
    )
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 12, "use_rslora": rslora}))
    loaded = load_peft(tmp_path, fresh)
    for site in ("conv", "heads", "merged"):
        for part, scale in (("down", 1), ("up", factor)):
            np.testing.assert_allclose(
                loaded[site]["lora"][part]["kernel"],
                scale * fresh[site]["lora"][part]["kernel"],
                rtol=1e-6,
            )


def test_mistakes_are_one_sentence(trained, tmp_path):
    _, _, params, omegas = trained
    base, adapters = lora.split(params)
    fresh = lora.split(random_variables(plain(6), X, None)["params"])[1]
    small = lora.split(random_variables(plain(2), X, None)["params"])[1]
    unbiased = lora.split(random_variables(plain(6, use_bias=False), X, None)["params"])[1]
    save_peft(tmp_path, adapters, omegas, conv1d="")
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "other.safetensors")
    rows = {site: np.ones((2, 3)) for site in omegas}
    part = {site: tree for site, tree in fresh.items() if site != "conv"}
    for action, words in (
        (lambda: save_adapters(tmp_path / "a.npz", adapters), "must end in .safetensors"),
        (lambda: save_adapters(tmp_path / "a.safetensors", base), "which is no adapter's"),
        (lambda: save_adapters(tmp_path / "a.safetensors", {}), "has no adapters"),
        (lambda: load_adapters(tmp_path / "other.safetensors"), "file of another kind"),
        (lambda: save_peft(tmp_path / "b", adapters, {}), "got weights for"),
        (lambda: save_peft(tmp_path / "b", adapters, rows, ""), "holds one condition"),
        (lambda: save_peft(tmp_path / "b", adapters, omegas), "'merged' has a kernel of three"),
        (lambda: save_peft(tmp_path / "b", adapters, omegas, "conv"), "'conv' is no 1-D"),
        (
            lambda: save_peft(tmp_path / "b", adapters, {**omegas, "conv": {("a",): 1}}),
            "weights for",
        ),
        (lambda: load_peft(tmp_path / "none", fresh), "adapter_config.json"),
        (lambda: load_peft(tmp_path, adapters), "has several adapters or a condition"),
        (lambda: load_peft(tmp_path, small), "does not fit PEFT's lora_A"),
        (lambda: load_peft(tmp_path, unbiased), "attach with use_bias=True"),
        (lambda: load_peft(tmp_path, part), "conv.* for which the model has no site"),
    ):
        with pytest.raises(UserError, match=words):
            action()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "IA3"}, "does not describe LoRA"),
        ({"use_dora": True}, "has use_dora"),
        ({"lora_alpha": "1"}, "no number lora_alpha"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            load_peft(tmp_path, fresh)
