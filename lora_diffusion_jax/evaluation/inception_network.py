"""The Inception-v3 of 2015-12-05 (1008 outputs), in whose pooled features the FID is defined.

It differs from torchvision's network of that name: 1008 classes, no auxiliary head, average pools
that do not count their padding, and a max pool in the last block's pooling branch. Batch
normalisation is folded into the convolutions when the weights are read (inception.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

SIDE = 299  # of the image that the network sees
POOL_DIM, NUM_LOGITS = 2048, 1008

Size = tuple[int, int]
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class Conv(NamedTuple):
    """A convolution with bias and ReLU; with stride 1 in a block it keeps the size."""

    name: str
    features: int
    size: Size = ONE
    stride: int = 1
    same: bool = True  # pad to keep the size; with stride 2 nothing is padded


class Pool(NamedTuple):
    """A 3x3 pool: stride 1 with padding, or stride 2 without."""

    kind: str  # 'mean' or 'max'
    stride: int = 1


class Split(NamedTuple):
    """Convolutions of one input whose outputs are joined."""

    convs: tuple[Conv, ...]


Step = Conv | Pool | Split
Branches = tuple[tuple[Step, ...], ...]


def _chain(name: str, features: Sequence[int], sizes: Sequence[Size], stride: int = 1) -> tuple:
    """Convolutions name_1, name_2, ...; the last has the stride."""
    strides = [1] * (len(sizes) - 1) + [stride]
    parts = enumerate(zip(features, sizes, strides, strict=True), start=1)
    return tuple(Conv(f"{name}_{i}", *part) for i, part in parts)


_TRIPLE = (64, 96, 96), (ONE, THREE, THREE)


def _block_a(pool_features: int) -> Branches:
    return (
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48, 64), (ONE, FIVE)),
        _chain("branch3x3dbl", *_TRIPLE),
        (Pool("mean"), Conv("branch_pool", pool_features)),
    )


def _block_c(inner: int) -> Branches:
    return (
        (Conv("branch1x1", 192),),
        _chain("branch7x7", (inner, inner, 192), (ONE, ROW, COLUMN)),
        _chain("branch7x7dbl", (*[inner] * 4, 192), (ONE, COLUMN, ROW, COLUMN, ROW)),
        (Pool("mean"), Conv("branch_pool", 192)),
    )


def _block_e(pool: str) -> Branches:
    def split(prefix: str) -> Split:
        return Split((Conv(f"{prefix}a", 384, (1, 3)), Conv(f"{prefix}b", 384, (3, 1))))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), split("branch3x3_2")),
        (*_chain("branch3x3dbl", (448, 384), (ONE, THREE)), split("branch3x3dbl_3")),
        (Pool(pool), Conv("branch_pool", 192)),
    )


STEM: tuple[Step, ...] = (
    Conv("Conv2d_1a_3x3", 32, THREE, 2),
    Conv("Conv2d_2a_3x3", 32, THREE, same=False),
    Conv("Conv2d_2b_3x3", 64, THREE),
    Pool("max", 2),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, THREE, same=False),
    Pool("max", 2),
)
BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, THREE, 2),),
        _chain("branch3x3dbl", *_TRIPLE, 2),
        (Pool("max", 2),),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        _chain("branch3x3", (192, 320), (ONE, THREE), 2),
        _chain("branch7x7x3", (192, 192, 192, 192), (ONE, ROW, COLUMN, THREE), 2),
        (Pool("max", 2),),
    ),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class Block(nn.Module):
    """Parallel branches over one input, their outputs joined along the channels."""

    branches: Branches

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([_run(branch, x) for branch in self.branches], axis=-1)


class InceptionV3(nn.Module):
    """Maps scaled images [B, 299, 299, 3] to (features [B, 2048], logits [B, 1008]).

    The logits omit the output layer's bias, as in the Inception Score of its authors and of all
    tools since.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = _run(STEM, x)
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(NUM_LOGITS, use_bias=False, name="fc")(features)


def _run(steps: tuple[Step, ...], x: jax.Array) -> jax.Array:
    for step in steps:
        match step:
            case Conv():
                x = _convolve(step, x)
            case Pool(kind, stride):
                x = _pool(x, kind, stride)
            case Split(convs):
                x = jnp.concatenate([_convolve(conv, x) for conv in convs], axis=-1)
    return x


def _convolve(conv: Conv, x: jax.Array) -> jax.Array:
    if conv.size == ONE:
        return nn.relu(nn.Dense(conv.features, name=conv.name)(x))
    strides = (conv.stride, conv.stride)
    if conv.same and conv.stride == 1:
        pads = [(k // 2, k // 2) for k in conv.size]
        return nn.relu(nn.Conv(conv.features, conv.size, strides, pads, name=conv.name)(x))
    # XLA's CPU backend is 2.5 times slower at convolutions without any padding: compute one extra
    # row and column, and cut them off.
    height, width = (
        (n - k) // conv.stride + 1 for n, k in zip(x.shape[1:3], conv.size, strict=True)
    )
    padded = nn.Conv(conv.features, conv.size, strides, [(0, 1), (0, 1)], name=conv.name)(x)
    return nn.relu(padded[:, :height, :width])


def _pool(x: jax.Array, kind: str, stride: int) -> jax.Array:
    """Pools rows, then columns, by combining three shifted slices: faster than windows on a CPU."""
    combine = jnp.maximum if kind == "max" else jnp.add
    edge = -jnp.inf if kind == "max" else 0.0
    count = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    for axis in (1, 2):
        x = _combine(x, axis, stride, combine, edge)
        count = _combine(count, axis, stride, jnp.add, 0.0)
    return x if kind == "max" else x / count


def _combine(
    x: jax.Array, axis: int, stride: int, combine: Callable[..., jax.Array], edge: float
) -> jax.Array:
    if stride == 1:
        pads = [(int(i == axis), int(i == axis)) for i in range(x.ndim)]
        x = jnp.pad(x, pads, constant_values=edge)
    last = (x.shape[axis] - 3) // stride * stride
    parts = [lax.slice_in_dim(x, k, last + k + 1, stride, axis) for k in range(3)]
    return combine(combine(parts[0], parts[1]), parts[2])
