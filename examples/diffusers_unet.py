"""UC-LoRA on Stable Diffusion's U-Net: `FlaxUNet2DConditionModel` of the package diffusers.

    pip install --no-deps "diffusers<0.36" "huggingface_hub<1" importlib_metadata zipp
    python examples/diffusers_unet.py

The releases before 0.36 still have Flax models. Here the U-Net is small and not trained; with
`from_pretrained` it has Stable Diffusion's weights, under the same names. The layers named to_q, to_k, to_v
and to_out_0 of its self- and cross-attention get adapters, and the output of `time_embedding` is their
condition. It predicts the noise in x_t = cos(t) x_0 + sin(t) noise; the adapters alone learn stripes.
"""

import functools

import jax
import jax.numpy as jnp
import optax  # a dependency of flax
from diffusers import FlaxUNet2DConditionModel

from lora_diffusion_jax import lora

TEXT = jnp.zeros((16, 1, 16))  # the states of a text encoder; there is none


def noise_error(model, params, key):
    """Mean squared error of the predicted noise on a fresh batch of stripes, [16, 1, 8, 8]."""
    draw, time, noise = jax.random.split(key, 3)
    phase, frequency = jax.random.uniform(draw, (2, 16, 1), minval=0.5, maxval=2.0)
    wave = jnp.sin(frequency * jnp.arange(8) + 3 * phase)
    x = jnp.repeat(wave[:, None], 8, 1)[:, None]  # diffusers has channels first
    t = jax.random.uniform(time, (16,), maxval=jnp.pi / 2)
    noise = jax.random.normal(noise, x.shape)
    angle = t[:, None, None, None]
    noisy = jnp.cos(angle) * x + jnp.sin(angle) * noise
    timesteps = 1000 * t / (jnp.pi / 2)
    return jnp.mean((model.apply({"params": params}, noisy, timesteps, TEXT).sample - noise) ** 2)


def main(steps: int = 100) -> dict[str, float]:
    """Attaches, and trains the adapters alone; returns the numbers that it prints."""
    model = FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
    )
    wrapped = lora.attach(
        model,
        sites=r".*(to_q|to_k|to_v|to_out_0)",
        adapter=lora.UCLoRA(rank=4, bases=4, widths=(16,)),
        condition="time_embedding",
    )
    call = jnp.zeros((1, 1, 8, 8)), jnp.ones(1), TEXT[:1]
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
