"""The snapshots of tests/golden, and changed copies of what they hold."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.readers.pickles import ModuleNode, read_snapshot

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("edm_lora", "ve_ncsnpp", "iddpm_adm")


def snapshot_path(name: str) -> Path:
    return GOLDEN / f"snapshot_{name}.pkl"


@functools.cache
def snapshot(name: str) -> ModuleNode:
    return read_snapshot(snapshot_path(name))


def outputs(name: str) -> dict[str, np.ndarray]:
    """Inputs x, sigma, labels of the official network, and its output D; images are NCHW."""
    with np.load(GOLDEN / "snapshot_outputs.npz") as data:
        keys = [key for key in data.files if key.startswith(f"{name}:")]
        return {key.split(":")[1]: data[key] for key in keys}


def replaced(node: ModuleNode, path: str, **changes: Any) -> ModuleNode:
    """A copy with the module at a dotted path changed."""
    if not path:
        return dataclasses.replace(node, **changes)
    head, _, rest = path.partition(".")
    child = replaced(node.children[head], rest, **changes)
    return dataclasses.replace(node, children=node.children | {head: child})


def with_arguments(node: ModuleNode, **arguments: Any) -> ModuleNode:
    """A copy whose network records other arguments of its constructor."""
    recorded = node.children["model"].init_kwargs
    return replaced(node, "model", init_kwargs={**recorded, **arguments})
