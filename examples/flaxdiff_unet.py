"""UC-LoRA on a published diffusion U-Net: `Unet` of the package flaxdiff.

    pip install --no-deps flaxdiff==0.2.11 && pip install einops
    python examples/flaxdiff_unet.py

The U-Net comes from PyPI as it is: the 20 layers named to_q, to_k, to_v and to_out_0 in its attention get
adapters, and the output of its `TimeProjection` is their condition. It predicts the noise in
x_t = cos(t) x_0 + sin(t) noise. Its parameters keep their random start, and the adapters alone learn stripes.
"""

import functools

import jax
import jax.numpy as jnp
import optax  # a dependency of flax
from flaxdiff.models.simple_unet import Unet

from lora_diffusion_jax import lora


def noise_error(model, params, key):
    """Mean squared error of the predicted noise on a fresh batch of stripes, [16, 8, 8, 1]."""
    draw, time, noise = jax.random.split(key, 3)
    phase, frequency = jax.random.uniform(draw, (2, 16, 1), minval=0.5, maxval=2.0)
    wave = jnp.sin(frequency * jnp.arange(8) + 3 * phase)
    x = jnp.repeat(wave[:, None], 8, 1)[..., None]
    t = jax.random.uniform(time, (16,), maxval=jnp.pi / 2)
    noise = jax.random.normal(noise, x.shape)
    angle = t[:, None, None, None]
    text = jnp.zeros((16, 1, 4))  # the U-Net's text condition; there is none
    noisy = jnp.cos(angle) * x + jnp.sin(angle) * noise
    return jnp.mean((model.apply({"params": params}, noisy, t, text) - noise) ** 2)


def main(steps: int = 100) -> dict[str, float]:
    """Attaches, and trains the adapters alone; returns the numbers that it prints."""
    model = Unet(
        output_channels=1,
        emb_features=16,
        feature_depths=(8, 16),
        attention_configs=({"heads": 2}, {"heads": 2}),
        num_res_blocks=1,
        norm_groups=4,
    )
    wrapped = lora.attach(
        model,
        sites=r".*(to_q|to_k|to_v|to_out_0)",
        adapter=lora.UCLoRA(rank=4, bases=4, widths=(16,)),
        condition=r".*TimeProjection.*",
    )
    call = jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros((1, 1, 4))
    params = jax.jit(wrapped.init)(jax.random.key(0), *call)["params"]
    base, _ = lora.split(params)
    labels = jax.tree.map(lambda own: "lora" if own else "frozen", lora.select(params))
    optimizer = optax.multi_transform(
        {"lora": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels
    )

    @jax.jit
    def step(params, moments, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads = jax.grad(noise_error, argnums=1)(wrapped, params, key)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    error = jax.jit(functools.partial(noise_error, wrapped, key=jax.random.key(2)))
    results = {"sites": len(lora.list_sites(params)), "error at the start": float(error(params))}
    moments = optimizer.init(params)
    for number in range(steps):
        params, moments = step(params, moments, number)
    results["error with trained adapters"] = float(error(params))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), lora.split(params)[0], base)
    results["change of the base"] = float(max(jax.tree.leaves(moved)))
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    main()
