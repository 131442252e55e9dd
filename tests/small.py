"""Small configs and networks shared by all tests, and ways to run them fast."""

import contextlib
import lzma
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax.default_config import base

ROOT = Path(__file__).parents[1]  # of the repository; commands run here

# Fields of a DDPM++ with two levels, attention on the lower one, and UC-LoRA; `__` stands for the dot.
SMALL_NETWORK = {
    "model__channels": 8,
    "model__channel_mult": (1, 2),
    "model__num_blocks": 1,
    "model__attn_resolutions": (4,),
    "lora__rank": 2,
    "lora__bases": 3,
    "lora__widths": (16, 8),
}


def fast_jit(function: Callable, **options: Any) -> Callable:
    """jax.jit; conftest.py has all programs compiled fast."""
    return jax.jit(function, **options)


def fast_apply(module: nn.Module, variables: Any, *args: Any) -> Any:
    """module.apply, compiled fast; an eager call takes several times as long.

    It compiles every operation on its own.
    """
    return fast_jit(lambda variables, *args: module.apply(variables, *args))(variables, *args)


def fast_compile_env(flags: str = "", **variables: str) -> dict[str, str]:
    """The environment for a subprocess with XLA flags beside those of conftest.py.

    Args:
        flags: more XLA_FLAGS, such as --xla_force_host_platform_device_count=8.
        variables: more environment variables.
    """
    return {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", **variables}


def run_on_eight(*arguments: Any, cwd: Path | None = None) -> str:
    """Runs Python with eight CPU devices; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=fast_compile_env("--xla_force_host_platform_device_count=8"),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def small_config(**changes: Any) -> ConfigDict:
    """A small unconditional network on 8x8 gray images, with fields changed: lora__rank=4."""
    config = base()
    config.data.image_size, config.data.channels = 8, 1
    for name, value in {**SMALL_NETWORK, **changes}.items():
        *parents, leaf = name.split("__")
        group = config
        for parent in parents:
            group = group[parent]
        group[leaf] = value
    return config


def config_flags(**changes: Any) -> list[str]:
    """The same on the command line: config_flags(lora__rank=4) is ['--config.lora.rank=4']."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]


def random_variables(module: nn.Module, *args: Any, scale: float = 0.2, seed: int = 1) -> Any:
    """Normal variables of which none is zero; the initialisers are not compiled or run."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), s.dtype), shapes
    )


class ConditionedNet(nn.Module):
    """An embedding `map` of the condition, and a block of every kind of layer LoRA attaches to.

    The call takes x [B, H, W, C] and a condition [B, E]; H and W are even.
    """

    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        embedding = nn.Dense(8, name="map")(condition)
        block = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        return block(name="block")(x) + nn.Dense(1, name="head")(embedding)[:, None, None]


class AttentionBlock(nn.Module):
    """Dense `qkv`, a strided 3x3 Conv, flax's attention (DenseGeneral), and Dense `proj`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(6, name="qkv")(x)
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(x)
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        tokens = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(tokens)
        return nn.Dense(4, use_bias=False, name="proj")(tokens.reshape(x.shape))


def unpacked(path: Path, folder: Path) -> Path:
    """A golden file, or its content in a folder if it is stored compressed as NAME.xz."""
    if path.suffix != ".xz":
        return path
    target = folder / path.stem
    target.write_bytes(lzma.decompress(path.read_bytes()))
    return target


@contextlib.contextmanager
def deep_folders(folder: Path, top: str, depth: int = 1500) -> Iterator[None]:
    """Folders inside one another below `folder`, deeper than Python can recurse, while inside."""
    place = os.open(folder, os.O_RDONLY)
    for name in (top, *["d"] * depth):
        os.mkdir(name, dir_fd=place)
        inner = os.open(name, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    try:
        yield
    finally:  # pytest's own removal would recurse
        subprocess.run(["rm", "-r", str(folder / top)], check=True)
