"""TimeLoRA and ClassLoRA on flax's own attention: an unconditional denoiser learns classes.

    python examples/transformer.py

`Transformer` stands for a model from elsewhere: it removes noise from sequences, given the time, and does
not know about classes. The adapters on the query, key, value and out layers of
`nn.MultiHeadDotProductAttention` get the time and the class from the arguments of the call; nothing inside
the model is tapped or changed.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax  # a dependency of flax

from lora_diffusion_jax import lora

CLASSES, LENGTH, TIMES = 4, 16, 100


# --------------------------------------------------------------------- a model from elsewhere


class Transformer(nn.Module):
    """Two pre-norm blocks; called as (x [B, L, 1], time [B])."""

    features: int = 32

    @nn.compact
    def __call__(self, x, time):
        position = self.param("position", nn.initializers.normal(1.0), (LENGTH, self.features))
        h = nn.Dense(self.features)(x) + position
        h = h + nn.Embed(TIMES + 1, self.features)(time)[:, None]
        for i in range(2):
            h = h + nn.MultiHeadDotProductAttention(4, name=f"attention_{i}")(nn.LayerNorm()(h))
            mlp = nn.Dense(2 * self.features)(nn.LayerNorm()(h))
            h = h + nn.Dense(self.features)(nn.gelu(mlp))
        return nn.Dense(1)(nn.LayerNorm()(h))


# ------------------------------------------------------------------------------ its training


class WithLabels(nn.Module):
    """Takes a class that the model ignores, so that the adapters can see it."""

    model: nn.Module

    def __call__(self, x, time, labels):
        return self.model(x, time)


def error(model, params, key):
    """Mean squared error of the denoised sequences; class k is a sine wave of k + 1 periods."""
    classes, times, noise = jax.random.split(key, 3)
    labels = jax.random.randint(classes, (64,), 0, CLASSES)
    time = jax.random.randint(times, (64,), 1, TIMES + 1)
    angle = 2 * jnp.pi * (labels[:, None] + 1) * jnp.arange(LENGTH) / LENGTH
    clean = jnp.sin(angle)[..., None]
    level = 4 * time[:, None, None] / TIMES  # up to four times the signal: the class is lost
    noisy = clean + level * jax.random.normal(noise, clean.shape)
    return jnp.mean((model.apply({"params": params}, noisy, time, labels) - clean) ** 2)


def train(model, params, optimizer, steps):
    """Trains `params`; which of them stay frozen is the optimizer's business."""

    @jax.jit
    def step(params, moments, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads = jax.grad(error, argnums=1)(model, params, key)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    moments = optimizer.init(params)
    for number in range(steps):
        params, moments = step(params, moments, number)
    return params


# -------------------------------------------------------------------------------------- LoRA


def main(pretraining: int = 200, adaptation: int = 200) -> dict[str, float]:
    """Pretrains without classes, adapts with them; returns the numbers that it prints."""
    model = WithLabels(Transformer())
    call = jnp.zeros((1, LENGTH, 1)), jnp.ones(1, int), jnp.zeros(1, int)
    base = jax.jit(model.init)(jax.random.key(0), *call)["params"]
    base = train(model, base, optax.adam(3e-3), pretraining)

    wrapped = lora.attach(
        model,
        sites=r".*/(query|key|value|out)",
        adapter=lora.SumOfAdapters(
            {
                "time": lora.TimeLoRA(rank=2, bases=5, num_timesteps=TIMES),
                "class": lora.ClassLoRA(rank=4, num_classes=CLASSES),
            }
        ),
        condition=lambda x, time, labels: {"time": time, "class": labels},
    )
    fresh = jax.jit(wrapped.init)(jax.random.key(2), *call)["params"]
    params = lora.merge(base, lora.split(fresh)[1])
    labels = jax.tree.map(lambda own: "lora" if own else "frozen", lora.select(params))
    optimizer = optax.multi_transform(
        {"lora": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels
    )

    test = jax.jit(functools.partial(error, wrapped, key=jax.random.key(3)))
    results = {"sites": len(lora.list_sites(params)), "error without classes": float(test(params))}
    params = train(wrapped, params, optimizer, adaptation)
    results["error with TimeLoRA and ClassLoRA"] = float(test(params))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), lora.split(params)[0], base)
    results["change of the base"] = float(max(jax.tree.leaves(moved)))
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    main()
