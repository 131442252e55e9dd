"""The examples and the README's snippet run, and adapters do what they promise on models from elsewhere."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.small import ROOT, fast_compile_env


def run(name: str) -> dict[str, float]:
    """The numbers that an example prints."""
    env = fast_compile_env(PYTHONPATH=str(ROOT))  # compiling takes longer than running
    command = [sys.executable, ROOT / "examples" / name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {k: float(v) for k, v in re.findall(r"^(.+): ([\d.e+-]+)$", done.stdout, re.M)}


def test_unet():
    results = run("unet.py")
    assert results["difference at the start"] == 0
    assert results["change of the base"] == 0
    assert results["difference after folding"] < 1e-5
    base, adapted = (results[f"error on vertical stripes, {n}"] for n in ("base", "with LoRA"))
    assert adapted < 0.7 * base


@pytest.mark.slow
def test_transformer():
    results = run("transformer.py")
    assert results["sites"] == 8
    assert results["change of the base"] == 0
    assert results["error with TimeLoRA and ClassLoRA"] < results["error without classes"] / 10


@pytest.mark.slow
def test_nnx_dit():
    results = run("nnx_dit.py")
    assert results["sites"] == 8
    assert results["difference at the start"] == 0
    assert results["change of the base"] == 0
    assert results["difference of the second copy"] == 0
    base, adapted = (results[f"error on vertical stripes, {n}"] for n in ("base", "with LoRA"))
    assert adapted < 0.7 * base


class Model(nn.Module):
    """What the README's snippet calls `model`."""

    @nn.compact
    def __call__(self, x, t):
        emb = nn.Dense(8, name="time_embedding")(t[:, None])
        return nn.MultiHeadDotProductAttention(2, name="attention")(x + emb[:, None])


@pytest.mark.parametrize("heading", ["Using LoRA with your own model"])
def test_readme_snippet(heading):
    """The wrapped model has adapters at the four layers and starts as exactly the model."""
    section = (ROOT / "README.md").read_text().partition(f"## {heading}\n")[2]
    model = Model()
    names = {"model": model}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], names)
    x, t = jnp.ones((1, 3, 8)), jnp.ones(1)
    variables = jax.jit(names["wrapped"].init)(jax.random.key(0), x, t)
    base, adapters = names["lora"].split(variables["params"])
    assert set(adapters["attention"]) == {"query", "key", "value", "out"}
    np.testing.assert_array_equal(
        names["wrapped"].apply(variables, x, t), model.apply({"params": base}, x, t)
    )


class NNXModel(nnx.Module):
    """What docs/own-networks.md calls `nnx_model`: the same in nnx."""

    def __init__(self, rngs):
        self.time_embedding = nnx.Linear(1, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x, t):
        return self.attention(x + self.time_embedding(t[:, None])[:, None])


def test_the_guide_to_own_networks(tmp_path, monkeypatch):
    """Its blocks run one after the other, and the adapters that come back from PEFT's files do the same."""
    monkeypatch.chdir(tmp_path)
    x, t = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.ones(2)
    model = Model()
    trained = jax.jit(model.init)(jax.random.key(1), x, t)["params"]
    names = {"jax": jax, "jnp": jnp, "optax": optax, "nnx": nnx, "x": x, "t": t}
    names |= {"model": model, "trained": trained, "nnx_model": NNXModel(nnx.Rngs(0))}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-networks.md").read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, names)
    folded = model.apply({"params": names["folded"]}, x[:1], t[:1])
    unfolded = names["wrapped"].apply({"params": names["params"]}, x[:1], t[:1])
    np.testing.assert_allclose(folded, unfolded, atol=1e-5)
    np.testing.assert_allclose(
        names["plain"](x[:1], t[:1]), names["adapted"](x[:1], t[:1]), atol=1e-4
    )
    assert np.abs(names["plain"](x, t) - names["nnx_model"](x, t)).max() > 1e-5
