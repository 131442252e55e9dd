"""Prints one JSON line: the speed of the augmentation and its share of a training step.

    python -m benchmarks.augment [--batch=512] [--size=32] [--gflop=127] [--step_ms=...]

The share is against the measured step (--step_ms) or, without it, against a step of --gflop
billion operations an image at the speed of a large matrix product measured here: no real step is
as fast, so the share is then an upper bound.
"""

import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from lora_diffusion_jax.data.augment import augment, draw

BATCH = flags.DEFINE_integer("batch", 512, "Images of a training step.")
SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images.")
CHANNELS = flags.DEFINE_integer("channels", 3, "Channels of the images.")
GFLOP = flags.DEFINE_float("gflop", 127.0, "Operations of a training step, billions an image.")
STEP_MS = flags.DEFINE_float("step_ms", None, "Measured training step without augmentation.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls; the median counts.")


def seconds(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    """Median time of a compiled call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def matmul_flops() -> float:
    """Operations a second of a large matrix product, float32 on CPU and bfloat16 elsewhere."""
    cpu = jax.default_backend() == "cpu"
    size = 2048 if cpu else 8192
    matrix = jnp.ones([size, size], jnp.float32 if cpu else jnp.bfloat16)
    return 2 * size**3 / seconds(jax.jit(jnp.dot), matrix, matrix)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Found the argument {argv[1]!r}; only --flags are known.")
    batch, shape = BATCH.value, (BATCH.value, SIZE.value, SIZE.value, CHANNELS.value)
    images = jax.random.uniform(jax.random.key(0), shape, minval=-1.0)

    def step(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return augment(images, draw(key, batch))

    spent = seconds(jax.jit(step), jax.random.key(1), images)
    if STEP_MS.value is not None:
        whole, source = STEP_MS.value / 1e3, "measured"
    else:
        whole, source = GFLOP.value * 1e9 * batch / matmul_flops(), "at matrix product speed"
    record = {
        "benchmark": "augment",
        "device": jax.devices()[0].device_kind,
        "images": list(shape),
        "images_per_second": round(batch / spent),
        "milliseconds_per_batch": round(spent * 1e3, 3),
        "step_milliseconds": round(whole * 1e3, 3),
        "step": source,
        "share_of_step": float(f"{spent / whole:.3g}"),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    app.run(main)
