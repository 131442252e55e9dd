"""3x3 convolutions on CPU: XLA's beside those of models/convolution.py, one JSON line a shape.

python -m benchmarks.convolution [--rounds=5] [--shapes=8x32x32x256x256,8x8x8x256x256]

output, input, kernel   time of XLA's convolution, and of its gradients with respect to the input and
                        the kernel, over the time of ours, the two in turn
error                   greatest difference of the two outputs, relative to the greatest output
"""

import argparse
import functools
import json

from lora_diffusion_jax import memory, xla_options

if __name__ == "__main__":  # before the threads of the imports below
    memory.keep_freed_memory()
    xla_options.merge_kernels()

import jax
import jax.numpy as jnp

from benchmarks.network import ratio
from lora_diffusion_jax.models import convolution

SAME = ((1, 1), (1, 1))
# batch x height x width x c_in x c_out: digits, a net of 1M parameters at 32x32, and CIFAR-10's
SHAPES = (
    "128x8x8x32x32,128x8x8x64x64,128x4x4x64x64,16x32x32x32x32,16x16x16x64x64,8x32x32x128x128,"
    "8x32x32x256x256,8x32x32x512x256,8x16x16x256x256,8x8x8x256x256"
)


def compare(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Times of XLA's over ours, and the error."""
    batch, height, width, c_in, c_out = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, c_in))
    g = jax.random.normal(keys[1], (batch, height, width, c_out))
    kernel = jax.random.normal(keys[2], (3, 3, c_in, c_out)) / (9 * c_in) ** 0.5

    plain, winograd = (
        functools.partial(f, SAME) for f in (convolution.plain, convolution.winograd)
    )
    parts = {
        "output": (plain, winograd, (x, kernel)),
        "input": (
            lambda g, kernel: jax.linear_transpose(lambda x: plain(x, kernel), x)(g)[0],
            lambda g, kernel: winograd(g, kernel[::-1, ::-1].swapaxes(2, 3)),
            (g, kernel),
        ),
        "kernel": (
            lambda x, g: jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(g)[0],
            lambda x, g: convolution.kernel_gradient(x, g, kernel.shape, SAME),
            (x, g),
        ),
    }
    found = {}
    for part, (by_xla, by_ours, inputs) in parts.items():
        # As arguments: XLA would compute with constants while it compiles.
        xla, ours = (functools.partial(jax.jit(f), *inputs) for f in (by_xla, by_ours))
        found[part] = ratio(xla, ours, rounds)
        if part == "output":
            found["error"] = float(jnp.abs(xla() - ours()).max() / jnp.abs(xla()).max())
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=SHAPES)
    args = parser.parse_args()
    for text in args.shapes.split(","):
        shape = tuple(map(int, text.split("x")))
        found = {key: float(f"{value:.3g}") for key, value in compare(shape, args.rounds).items()}
        print(json.dumps({"benchmark": "convolution", "shape": shape, **found}), flush=True)


if __name__ == "__main__":
    main()
