"""What LoRA, class labels and augmentation cost: ratios of times measured side by side, one JSON line.

python -m benchmarks.network [--config=digits|cifar10_edm] [--rounds=7] [--batch=64]

evaluation_lora     one evaluation of the network with LoRA over one without
evaluation_scalar   one noise level for all images over one per image (unconditional)
step_lora           a training step (loss, gradients) with LoRA over one without
step_augment        with augmentation over without, both with LoRA
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax.factory.networks import build_denoiser, image_shape, init_variables
from lora_diffusion_jax.factory.objectives import build_objective


def variant(name: str, **changes: object) -> ConfigDict:
    """A config of configs/ with fields changed: lora__mode='baseline'."""
    config = importlib.import_module(f"configs.{name}").get_config()
    for field, value in changes.items():
        group, leaf = field.split("__") if "__" in field else (None, field)
        (config[group] if group else config)[leaf] = value
    return config


def evaluation(config: ConfigDict, batch: int, *, scalar: bool) -> Callable[[], jax.Array]:
    """A compiled call of the denoiser."""
    denoiser = build_denoiser(config)
    variables = init_variables(config, denoiser, jax.random.key(0))
    x = jnp.ones((batch, *image_shape(config)))
    sigma = jnp.ones(()) if scalar else jnp.ones(batch)
    labels = jnp.eye(10)[np.arange(batch) % 10] if config.class_conditional else None
    call = jax.jit(denoiser.apply)
    return lambda: call(variables, x, sigma, labels)


def step(config: ConfigDict, batch: int) -> Callable[[], jax.Array]:
    """A compiled call of the loss and its gradients."""
    denoiser = build_denoiser(config)
    variables = init_variables(config, denoiser, jax.random.key(0))
    objective = build_objective(config, denoiser)
    images = jnp.zeros((batch, *image_shape(config)))
    labels = jnp.eye(10)[np.arange(batch) % 10]

    def loss(variables: dict, key: jax.Array) -> jax.Array:
        draws = objective.draw(key, images.shape)
        return objective.loss(variables, images, labels, draws, True)["loss"].sum()

    call = jax.jit(jax.grad(loss))
    return lambda: call(variables, jax.random.key(1))


def ratio(first: Callable[[], jax.Array], second: Callable[[], jax.Array], rounds: int) -> float:
    """Median over rounds of time(first) / time(second), the two in turn."""
    jax.block_until_ready((first(), second()))
    ratios = []
    for _ in range(rounds):
        times = []
        for call in (first, second):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    lora, bare = variant(args.config), variant(args.config, lora__mode="baseline")
    free = variant(args.config, class_conditional=False)
    augmented = variant(args.config, augment__p=0.12, model__augment_dim=9)
    plain = variant(args.config, augment__p=0.0, model__augment_dim=9)
    pairs = {
        "evaluation_lora": lambda: (
            evaluation(lora, args.batch, scalar=True),
            evaluation(bare, args.batch, scalar=True),
        ),
        "evaluation_scalar": lambda: (
            evaluation(free, args.batch, scalar=True),
            evaluation(free, args.batch, scalar=False),
        ),
        "step_lora": lambda: (step(lora, args.batch), step(bare, args.batch)),
        "step_augment": lambda: (step(augmented, args.batch), step(plain, args.batch)),
    }
    result = {name: round(ratio(*make(), args.rounds), 4) for name, make in pairs.items()}
    device = jax.devices()[0].device_kind
    about = {"benchmark": "network", "config": args.config, "batch": args.batch, "device": device}
    print(json.dumps({**about, **result}))


if __name__ == "__main__":
    main()
