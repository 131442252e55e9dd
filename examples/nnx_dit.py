"""UC-LoRA on a diffusion transformer in flax.nnx: attach, train the adapters alone, save and load them.

    python examples/nnx_dit.py

`DiT` stands for a model from elsewhere (Peebles and Xie, arXiv 2212.09748, small). It predicts the noise in
x_t = cos(t) x_0 + sin(t) noise. It is first trained on horizontal stripes; then its parameters are frozen,
and adapters on its attention layers learn vertical stripes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax  # a dependency of flax
from flax import nnx

from lora_diffusion_jax import lora

# --------------------------------------------------------------------- a model from elsewhere


class TimeEmbedding(nnx.Module):
    """Sinusoids of the time [B], then two layers: [B, features]."""

    def __init__(self, features, rngs):
        self.first = nnx.Linear(16, features, rngs=rngs)
        self.second = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, t):
        angles = t[:, None] * 2.0 ** jnp.arange(8)
        h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.second(nnx.silu(self.first(h)))


class Block(nnx.Module):
    """Attention and MLP, each scaled, shifted and gated by the time embedding (adaLN-Zero)."""

    def __init__(self, features, rngs):
        self.norm = nnx.LayerNorm(features, use_scale=False, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, features, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(features, 4 * features, rngs=rngs),
            nnx.gelu,
            nnx.Linear(4 * features, features, rngs=rngs),
        )
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(features, 6 * features, kernel_init=zeros, rngs=rngs)

    def __call__(self, x, emb):
        changes = jnp.split(self.modulation(nnx.silu(emb))[:, None], 6, axis=-1)
        scale, shift, gate = changes[:3]
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        scale, shift, gate = changes[3:]
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiT(nnx.Module):
    """Called as (x [B, 8, 8, 1], t [B]); patches of 2 x 2."""

    def __init__(self, features=32, depth=2, *, rngs):
        self.embed = nnx.Conv(1, features, (2, 2), strides=2, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (16, features)))
        self.time = TimeEmbedding(features, rngs)
        self.blocks = nnx.List([Block(features, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.out = nnx.Linear(features, 4, rngs=rngs)

    def __call__(self, x, t):
        emb = self.time(t)
        h = self.embed(x).reshape(len(x), 16, -1) + self.position[...]
        for block in self.blocks:
            h = block(h, emb)
        h = self.out(self.norm(h)).reshape(-1, 4, 4, 2, 2)
        return h.transpose(0, 1, 3, 2, 4).reshape(x.shape)


# ------------------------------------------------------------------------------ its training


def noise_error(model, key, vertical):
    """Mean squared error of the predicted noise on a fresh batch of stripes."""
    draw, time, noise = jax.random.split(key, 3)
    phase, frequency = jax.random.uniform(draw, (2, 64, 1), minval=0.5, maxval=2.0)
    wave = jnp.sin(frequency * jnp.arange(8) + 3 * phase)
    axis = 1 if vertical else 2
    x = jnp.repeat(jnp.expand_dims(wave, axis), 8, axis)[..., None]
    t = jax.random.uniform(time, (64,), maxval=jnp.pi / 2)
    noise = jax.random.normal(noise, x.shape)
    angle = t[:, None, None, None]
    return jnp.mean((model(jnp.cos(angle) * x + jnp.sin(angle) * noise, t) - noise) ** 2)


def train(model, which, rate, steps, vertical):
    """Trains the parameters of one type, `which`, alone."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=which)

    @nnx.jit
    def step(model, optimizer, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads = nnx.grad(noise_error, argnums=nnx.DiffState(0, which))(model, key, vertical)
        optimizer.update(model, grads)

    for number in range(steps):
        step(model, optimizer, number)


# -------------------------------------------------------------------------------------- LoRA


def main(pretraining: int = 100, adaptation: int = 200) -> dict[str, float]:
    """Pretrains, adapts, and moves the adapters to a second model; returns the numbers that it prints."""
    error = nnx.jit(noise_error, static_argnums=2)
    model = DiT(rngs=nnx.Rngs(0))
    train(model, nnx.Param, 2e-3, pretraining, vertical=False)
    x, t = jax.random.normal(jax.random.key(2), (2, 8, 8, 1)), jnp.array([0.2, 1.2])

    # 1. Attach. The result is a clone of the model with adapters; the model stays as it is.
    settings: dict[str, Any] = {
        "sites": r".*/attention/(query|key|value|out)",
        "adapter": lora.UCLoRA(rank=4, bases=6),
        "condition": "time",  # the output of `model.time`
        "inputs": (x, t),  # tells the adapters their sizes
    }
    adapted = lora.attach(model, **settings)
    results = {
        "sites": len(lora.list_sites(lora.adapter_tree(adapted))),
        "difference at the start": float(jnp.abs(adapted(x, t) - model(x, t)).max()),
    }

    # 2. Train the adapters alone: their parameters are lora.LoRAParam.
    train(adapted, lora.LoRAParam, 1e-2, adaptation, vertical=True)
    key = jax.random.key(3)
    results["error on vertical stripes, base"] = float(error(model, key, True))
    results["error on vertical stripes, with LoRA"] = float(error(adapted, key, True))
    base = nnx.state(adapted, nnx.All(nnx.Param, nnx.Not(lora.LoRAParam)))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), base, nnx.state(model, nnx.Param))
    results["change of the base"] = float(max(jax.tree.leaves(moved)))

    # 3. The adapters alone go to another copy of the base.
    second = lora.attach(model, **settings)
    lora.update_adapters(second, lora.adapter_tree(adapted))
    results["difference of the second copy"] = float(jnp.abs(second(x, t) - adapted(x, t)).max())
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    main()
