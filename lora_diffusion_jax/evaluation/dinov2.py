"""DINOv2 features (Oquab et al. 2023) for FD-DINOv2 (Stein et al. 2023), from a given weights file.

Preprocessing as in EDM2's evaluation: antialiased bicubic resize to 224 x 224, ImageNet's mean and
deviation. The feature is the normalised class token: [B, 1024] for ViT-L/14, as papers use it.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_diffusion_jax import files
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import resize
from lora_diffusion_jax.evaluation.features import Detector, sha256_of, shape_differences
from lora_diffusion_jax.readers.pickles import read_torch_state_dict

VARIABLE = "LORA_DIFFUSION_DINOV2"
FILE_NAME = "dinov2_vitl14_pretrain.pth"
SIDE, PATCH = resize.BICUBIC_SIDE, 14
GRID = SIDE // PATCH
HEAD_DIM = 64
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def load_dinov2(path: str | os.PathLike[str] | None = None) -> Detector:
    """Returns the DINOv2 features; calling them maps uint8 images NHWC to [B, 1024] for ViT-L/14.

    Args:
        path: the official `dinov2_vit{s,b,l}14_pretrain.pth`; None: $LORA_DIFFUSION_DINOV2.

    Raises:
        UserError: no file, a damaged one, or another network's.
    """
    named = path or os.environ.get(VARIABLE)
    named = files.expand(named or "", VARIABLE)
    if not Path(named).is_file():
        raise UserError(
            f"There is no DINOv2 weights file {named}. Download the official {FILE_NAME}, and "
            f"pass --dinov2=PATH or set {VARIABLE}=PATH."
        )
    path = Path(named)
    return make_detector(read_torch_state_dict(path), path, sha256_of(path))


def make_detector(state_dict: Mapping[str, np.ndarray], path: Path, source_hash: str) -> Detector:
    """Returns the features of an official state_dict; `path` is its name in errors."""
    width, depth = _check(path, state_dict)
    network = VisionTransformer(width, depth)
    # FD-DINOv2 in papers means ViT-L/14; other sizes are named.
    size = {384: "_vits14", 768: "_vitb14", 1024: ""}.get(width, f"_{width}x{depth}")
    return Detector(
        name=f"dinov2{size}",
        feature_dim=width,
        network=lambda variables, images: network.apply(variables, prepare(images)),
        variables={"params": to_params(state_dict, width, depth)},
        has_classes=False,
        details={"weights_sha256": source_hash},
    )


class VisionTransformer(nn.Module):
    """Maps prepared images [B, 224, 224, 3] to (class token [B, width], no logits [B, 0])."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = len(x)
        x = x.reshape(batch, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width, name="patch")(x.reshape(batch, GRID**2, -1))
        token = self.param("token", nn.initializers.zeros, (self.width,))
        position = self.param("position", nn.initializers.zeros, (GRID**2 + 1, self.width))
        token = jnp.broadcast_to(token, (batch, 1, self.width))
        x = jnp.concatenate([token, x], axis=1) + position
        for index in range(self.depth):
            x = Block(self.width, name=f"block{index}")(x)
        features = nn.LayerNorm(epsilon=1e-6, name="norm")(x[:, 0])
        return features, features[:, :0]


class Block(nn.Module):
    """x + g1 attention(norm(x)), then x + g2 mlp(norm(x)), with learned gains g1 and g2."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.width // HEAD_DIM
        gains = [self.param(f"gain{i}", nn.initializers.ones, (self.width,)) for i in (1, 2)]
        qkv = nn.Dense(3 * self.width, name="qkv")(nn.LayerNorm(epsilon=1e-6, name="norm1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, HEAD_DIM), 2, 0)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q * HEAD_DIM**-0.5, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + gains[0] * nn.Dense(self.width, name="proj")(mixed)
        hidden = nn.Dense(4 * self.width, name="fc1")(nn.LayerNorm(epsilon=1e-6, name="norm2")(x))
        return x + gains[1] * nn.Dense(self.width, name="fc2")(nn.gelu(hidden, approximate=False))


def prepare(images: jax.Array) -> jax.Array:
    """Resizes and normalises uint8 [B, H, W, C]; gray becomes three equal channels."""
    return (resize.resized(images, resize.bicubic_weights) / 255.0 - MEAN) / DEVIATION


def position_weights(size: int) -> np.ndarray:
    """Returns the resize of the learned positions from a size x size grid to 16: [16, size].

    Official: bicubic with a = -3/4 without antialias, edges repeated, by the factor
    (16 + 0.1) / size, whose 0.1 guards the official code's rounding and shifts the samples.
    """
    source = (np.arange(GRID) + 0.5) * (size / (GRID + 0.1)) - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((GRID, size))
    for offset in range(4):
        place = first + offset
        value = resize.keys_kernel(source - place, -0.75)
        np.add.at(weights, (np.arange(GRID), np.clip(place, 0, size - 1)), value)
    return weights


_RENAMES = (  # patterns of paths here, and the official names
    (r"^patch/", "patch_embed.proj."),
    (r"^token$", "cls_token"),
    (r"^position$", "pos_embed"),
    (r"^block(\d+)/", r"blocks.\1."),
    (r"gain(\d)$", r"ls\1.gamma"),
    (r"\.(qkv|proj)/", r".attn.\1."),
    (r"\.fc(\d)/", r".mlp.fc\1."),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)


@functools.cache
def parameters(width: int, depth: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns (official name, shape) of every parameter by its path."""
    blank = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    variables = jax.eval_shape(VisionTransformer(width, depth).init, jax.random.key(0), blank)
    found = {}
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        name = path
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        found[path] = name, leaf.shape
    return found


def to_params(state_dict: Mapping[str, np.ndarray], width: int, depth: int) -> PyTree:
    """Renames and transposes the official weights; positions are resized to 224 pixels."""
    flat = {}
    for path, (name, _) in parameters(width, depth).items():
        value = np.asarray(state_dict[name], np.float32)
        flat[path] = value.T if path.endswith("kernel") else value
    patch = flat["patch/kernel"].transpose(1, 0, 2, 3)  # .T of [out, 3, h, w] has columns first
    flat["patch/kernel"] = patch.reshape(PATCH * PATCH * 3, -1)
    flat["token"] = flat["token"][0, 0]
    position = flat["position"][0].astype(np.float64)
    side = round((len(position) - 1) ** 0.5)
    matrix = position_weights(side) if side != GRID else np.eye(GRID)
    grid = position[1:].reshape(side, side, -1)
    grid = np.einsum("yh,hwc,xw->yxc", matrix, grid, matrix).reshape(GRID**2, -1)
    flat["position"] = np.concatenate([position[:1], grid]).astype(np.float32)
    return unflatten_dict({k: np.ascontiguousarray(v) for k, v in flat.items()}, sep="/")


def expected_shapes(width: int, depth: int, positions: int) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the official state_dict."""
    return {name: shape[::-1] for name, shape in parameters(width, depth).values()} | {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
    }


def _check(path: Path, state_dict: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (width, depth); raises UserError unless the weights are those of such a network."""
    blocks = {m[1] for n in state_dict if (m := re.match(r"blocks\.(\d+)\.", n))}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
    width, depth = (found.get("cls_token") or (0,))[-1], len(blocks)
    positions = (*found.get("pos_embed", ()), 0, 0)[1]
    square = round(max(positions - 1, 0) ** 0.5) ** 2 == positions - 1
    whole = width >= HEAD_DIM and width % HEAD_DIM == 0 and depth <= 40
    expected = expected_shapes(width, depth, positions) if whole else {}
    difference = shape_differences(found, expected)
    if difference or not square:
        raise UserError(
            f"{path} holds the weights of another network ({difference or 'pos_embed is not square'}); "
            f"expected the official {FILE_NAME} or its small and base variants, without registers."
        )
    return width, depth
