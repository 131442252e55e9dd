"""UC-LoRA on somebody's U-Net: attach, train the adapters alone, inspect, fold.

    python examples/unet.py

`UNet` stands for a model from elsewhere: plain Flax, without a line about LoRA. It predicts the noise in
x_t = cos(t) x_0 + sin(t) noise. It is first trained on horizontal stripes; then its parameters are frozen,
and adapters on its attention layers learn vertical stripes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax  # a dependency of flax

from lora_diffusion_jax import lora

# --------------------------------------------------------------------- a model from elsewhere


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then two Dense layers."""

    features: int

    @nn.compact
    def __call__(self, t):
        frequencies = 2.0 ** jnp.arange(8)
        angles = t[:, None] * frequencies
        h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return nn.Dense(self.features)(nn.silu(nn.Dense(self.features)(h)))


class Block(nn.Module):
    """Group norm, convolution, and the time embedding added."""

    features: int

    @nn.compact
    def __call__(self, x, emb):
        h = nn.Conv(self.features, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
        return nn.silu(h + nn.Dense(self.features)(nn.silu(emb))[:, None, None])


class UNet(nn.Module):
    """Two resolutions, self-attention at the lower one; called as (x [B, H, W, C], t [B])."""

    features: int = 16

    @nn.compact
    def __call__(self, x, t):
        emb = TimeEmbedding(self.features, name="time_embedding")(t)
        high = Block(self.features)(nn.Conv(self.features, (3, 3))(x), emb)
        h = Block(2 * self.features)(nn.avg_pool(high, (2, 2), (2, 2)), emb)
        h = h + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.GroupNorm(8)(h))
        h = jax.image.resize(h, (*high.shape[:3], h.shape[-1]), "nearest")
        h = Block(self.features)(jnp.concatenate([h, high], axis=-1), emb)
        return nn.Conv(x.shape[-1], (3, 3))(nn.silu(nn.GroupNorm(8)(h)))


# ------------------------------------------------------------------------------ its training


def stripes(key, count, *, vertical):
    """Sine waves of random phase and frequency, [count, 8, 8, 1]."""
    phase, frequency = jax.random.uniform(key, (2, count, 1), minval=0.5, maxval=2.0)
    wave = jnp.sin(frequency * jnp.arange(8) + 3 * phase)
    axis = 1 if vertical else 2
    return jnp.repeat(jnp.expand_dims(wave, axis), 8, axis)[..., None]


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x, t):
    """The predicted noise."""
    return model.apply({"params": params}, x, t)


@functools.partial(jax.jit, static_argnums=(0, 3))
def noise_error(model, params, key, vertical):
    """Mean squared error of the predicted noise on a fresh batch."""
    data, time, noise = jax.random.split(key, 3)
    x = stripes(data, 32, vertical=vertical)
    t = jax.random.uniform(time, (32,), maxval=jnp.pi / 2)
    noise = jax.random.normal(noise, x.shape)
    angle = t[:, None, None, None]
    prediction = run(model, params, jnp.cos(angle) * x + jnp.sin(angle) * noise, t)
    return jnp.mean((prediction - noise) ** 2)


def train(model, params, optimizer, steps, vertical):
    """Trains `params`; which of them stay frozen is the optimizer's business."""

    @jax.jit
    def step(params, moments, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads = jax.grad(noise_error, argnums=1)(model, params, key, vertical)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    moments = optimizer.init(params)
    for number in range(steps):
        params, moments = step(params, moments, number)
    return params


# -------------------------------------------------------------------------------------- LoRA


def main(pretraining: int = 80, adaptation: int = 150) -> dict[str, float]:
    """Runs the four steps; returns the numbers that it prints."""
    x, t = jnp.zeros((2, 8, 8, 1)), jnp.array([0.2, 1.2])
    model = UNet()
    base = jax.jit(model.init)(jax.random.key(0), x, t)["params"]
    base = train(model, base, optax.adam(2e-3), pretraining, vertical=False)

    # 1. Attach. The wrapped model is called like the model; its base parameters keep their paths.
    wrapped = lora.attach(
        model,
        sites=r".*/(query|key|value|out)",
        adapter=lora.UCLoRA(rank=4, bases=6),
        condition=r"time_embedding",
    )
    fresh = jax.jit(wrapped.init)(jax.random.key(2), x, t)["params"]
    params = lora.merge(base, lora.split(fresh)[1])
    print("sites:", ", ".join(lora.list_sites(params)))
    print(f"parameters: {lora.count(base):,} + {lora.count(params) - lora.count(base):,} of LoRA")
    probe = stripes(jax.random.key(3), 2, vertical=True)
    at_start = run(wrapped, params, probe, t) - run(model, base, probe, t)

    # 2. Train the adapters alone.
    labels = jax.tree.map(lambda own: "lora" if own else "frozen", lora.select(params))
    optimizer = optax.multi_transform(
        {"lora": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels
    )
    before = noise_error(wrapped, params, jax.random.key(4), True)
    params = train(wrapped, params, optimizer, adaptation, vertical=True)
    after = noise_error(wrapped, params, jax.random.key(4), True)

    # 3. Inspect: the composition weights that two times ask for at one site.
    look = jax.jit(functools.partial(lora.composition_weights, wrapped))
    omega = look({"params": params}, probe, t)
    for time, weights in zip(t, omega["attention/query"], strict=True):
        print(f"omega at t={time:.1f}:", " ".join(f"{w:+.2f}" for w in weights))

    # 4. Fold: for one time, base parameters alone do the same.
    first = {site: jnp.asarray(weights)[:1] for site, weights in omega.items()}
    same = jnp.full(2, t[0])
    folded = run(model, lora.fold(params, first), probe, same)
    unfolded = run(wrapped, params, probe, same)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), lora.split(params)[0], base)
    results = {
        "difference at the start": float(jnp.abs(at_start).max()),
        "error on vertical stripes, base": float(before),
        "error on vertical stripes, with LoRA": float(after),
        "change of the base": float(max(jax.tree.leaves(moved))),
        "difference after folding": float(jnp.abs(folded - unfolded).max()),
    }
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    main()
