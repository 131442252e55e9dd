"""The gradient of a 3x3 convolution's kernel on CPU: XLA's own beside matrix products, one JSON line a shape.

python -m benchmarks.convolution [--rounds=5] [--shapes=8x32x32x256x256,8x8x8x256x256]

ratio   time of XLA's gradient over that of the products (models/convolution.py), the two in turn
"""

import argparse
import functools
import json

import jax

from benchmarks.network import ratio
from lora_diffusion_jax.models import convolution

SAME = ((1, 1), (1, 1))
# batch x height x width x c_in x c_out: digits, a net of 1M parameters at 32x32, and CIFAR-10's
SHAPES = (
    "128x8x8x32x32,128x8x8x64x64,128x4x4x64x64,16x32x32x32x32,16x16x16x64x64,8x32x32x128x128,"
    "8x32x32x256x256,8x32x32x512x256,8x16x16x256x256,8x8x8x256x256"
)


def compare(shape: tuple[int, ...], rounds: int) -> float:
    """Time of XLA's gradient over that of the products."""
    batch, height, width, c_in, c_out = shape
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (batch, height, width, c_in))
    g = jax.random.normal(keys[1], (batch, height, width, c_out))
    kernel = jax.ShapeDtypeStruct((3, 3, c_in, c_out), x.dtype)

    def by_xla(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(functools.partial(convolution.plain, SAME, x), kernel)(g)[0]

    def by_products(x: jax.Array, g: jax.Array) -> jax.Array:
        return convolution.kernel_gradient(x, g, kernel.shape, SAME)

    first, second = jax.jit(by_xla), jax.jit(by_products)
    return ratio(lambda: first(x, g), lambda: second(x, g), rounds)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=SHAPES)
    args = parser.parse_args()
    for text in args.shapes.split(","):
        shape = tuple(map(int, text.split("x")))
        found = {"benchmark": "convolution", "shape": shape, "ratio": compare(shape, args.rounds)}
        print(json.dumps({**found, "ratio": round(found["ratio"], 2)}), flush=True)


if __name__ == "__main__":
    main()
