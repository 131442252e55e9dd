"""DINOv2 features (Oquab et al. 2023) for FD-DINOv2 (Stein et al. 2023), from a given weights file.

Preprocessing as in EDM2's evaluation: antialiased bicubic resize to 224 x 224, ImageNet's mean and
deviation. The feature is the normalised class token: [B, 1024] for ViT-L/14, which papers use.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.inception import sha256_of
from lora_diffusion_jax.readers.pickles import read_torch_state_dict
from lora_diffusion_jax.readers.safetensors import is_safetensors

VARIABLE = "LORA_DIFFUSION_DINOV2"
FILE_NAME = "dinov2_vitl14_pretrain.pth"
SIDE, PATCH = 224, 14
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
    if not named or not Path(named).expanduser().is_file():
        raise UserError(
            f"There is no DINOv2 weights file {named or ''}: get the official {FILE_NAME}, and pass "
            f"--dinov2=PATH or set {VARIABLE}=PATH."
        )
    path = Path(named).expanduser()
    if is_safetensors(path):
        raise UserError(f"{path} is a safetensors file; expected the official {FILE_NAME}.")
    return make_detector(read_torch_state_dict(path), path, sha256_of(path))


def make_detector(state_dict: Mapping[str, np.ndarray], path: Path, source_hash: str) -> Detector:
    """Returns the features of an official state_dict; `path` names it in errors."""
    width, depth = _check(path, state_dict)
    network = VisionTransformer(width, depth)
    # Papers' FD-DINOv2 is that of ViT-L/14; the other sizes say what they are.
    size = {384: "_vits14", 768: "_vitb14", 1024: ""}.get(width, f"_{width}x{depth}")
    return Detector(
        name=f"dinov2{size}",
        feature_dim=width,
        network=lambda variables, images: network.apply(variables, prepare(images)),
        variables={"params": to_params(state_dict, depth)},
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
    rows, columns = (bicubic_weights(side) for side in images.shape[1:3])
    x = jnp.einsum("yh,bhwc,xw->byxc", rows, images.astype(jnp.float32), columns)
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) / 255.0 - MEAN) / DEVIATION


def bicubic_weights(size: int) -> np.ndarray:
    """Returns the antialiased bicubic resize (Keys, a = -1/2) to 224 pixels as [224, size]."""
    scale = size / SIDE
    reach = max(scale, 1.0)  # the kernel widens when the image shrinks
    centres = (np.arange(SIDE) + 0.5) * scale - 0.5
    weights = keys_kernel((np.arange(size) - centres[:, None]) / reach, -0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) with slope parameter a."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


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
        value = keys_kernel(source - place, -0.75)
        np.add.at(weights, (np.arange(GRID), np.clip(place, 0, size - 1)), value)
    return weights


def to_params(state_dict: Mapping[str, np.ndarray], depth: int) -> PyTree:
    """Renames and transposes the official weights; positions are resized to 224 pixels."""
    s = {name: np.asarray(value, np.float32) for name, value in state_dict.items()}
    position = s["pos_embed"][0].astype(np.float64)
    side = round((len(position) - 1) ** 0.5)
    resize = position_weights(side) if side != GRID else np.eye(GRID)
    grid = position[1:].reshape(side, side, -1)
    grid = np.einsum("yh,hwc,xw->yxc", resize, grid, resize).reshape(GRID**2, -1)
    # [out, 3, 14, 14] -> [14 * 14 * 3, out]
    patch = s["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(PATCH * PATCH * 3, -1)
    flat: dict[str, np.ndarray] = {
        "token": s["cls_token"][0, 0],
        "position": np.concatenate([position[:1], grid]).astype(np.float32),
        "patch/kernel": patch,
        "patch/bias": s["patch_embed.proj.bias"],
        "norm/scale": s["norm.weight"],
        "norm/bias": s["norm.bias"],
    }
    dense = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for i in range(depth):
        for ours, theirs in dense.items():
            flat[f"block{i}/{ours}/kernel"] = s[f"blocks.{i}.{theirs}.weight"].T
            flat[f"block{i}/{ours}/bias"] = s[f"blocks.{i}.{theirs}.bias"]
        for k in (1, 2):
            flat[f"block{i}/gain{k}"] = s[f"blocks.{i}.ls{k}.gamma"]
            flat[f"block{i}/norm{k}/scale"] = s[f"blocks.{i}.norm{k}.weight"]
            flat[f"block{i}/norm{k}/bias"] = s[f"blocks.{i}.norm{k}.bias"]
    return unflatten_dict({k: np.ascontiguousarray(v) for k, v in flat.items()}, sep="/")


def expected_shapes(width: int, depth: int, positions: int) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the official state_dict."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    dense = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for i in range(depth):
        for name, shape in dense.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (width,)
        shapes |= {f"blocks.{i}.ls{k}.gamma": (width,) for k in (1, 2)}
    return shapes


def _check(path: Path, state_dict: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (width, depth); raises UserError unless the weights are of such a network."""
    blocks = {int(m[1]) for n in state_dict if (m := re.match(r"blocks\.(\d+)\.", n))}
    found = {name: tuple(value.shape) for name, value in state_dict.items()}
    width, depth = found.get("cls_token", (0,))[-1], len(blocks)
    positions = found.get("pos_embed", (0, 0))[1]
    square = round(max(positions - 1, 0) ** 0.5) ** 2 == positions - 1
    wrong = sorted(set(expected_shapes(width, depth, positions).items()) ^ set(found.items()))
    if wrong or not square or width < HEAD_DIM or width % HEAD_DIM:
        name = wrong[0][0] if wrong else "pos_embed"
        raise UserError(
            f"{path} holds the weights of another network ({name} is "
            f"{found.get(name, 'absent')}); expected the official {FILE_NAME} or its small and "
            "base variants, without registers."
        )
    return width, depth


def random_state_dict(width: int, depth: int, side: int = 37, seed: int = 0) -> dict:
    """Returns random weights under the official names, for tests without the file."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in expected_shapes(width, depth, side**2 + 1).items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("weight") and len(shape) > 1:
            value *= float(np.prod(shape[1:])) ** -0.5
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            value = 1 + 0.1 * value
        else:
            value *= 0.3
        found[name] = value
    return found
