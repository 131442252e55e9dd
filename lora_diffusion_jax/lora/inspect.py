"""Looking into an adapted module: which sites it has, and what weights a condition gives them."""

from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from lora_diffusion_jax.lora.attach import NAME

PyTree = Any


def list_sites(params: PyTree) -> list[str]:
    """Paths of the adapted layers in a parameter tree, sorted."""
    flat = traverse_util.flatten_dict(params)
    return sorted({"/".join(k[: k.index(NAME)]) for k in flat if NAME in k})


def composition_weights(
    wrapped: nn.Module, variables: PyTree, *args: Any, **kwargs: Any
) -> dict[str, jax.Array | dict[tuple[str, ...], jax.Array]]:
    """Runs a module with adapters and returns site path -> omega [B or 1, m].

    A site with several adapters (`SumOfAdapters`) has a dictionary (adapter's name,) -> omega.
    """
    _, state = wrapped.apply(variables, *args, mutable=["intermediates"], **kwargs)
    weights: dict = {}
    for path, values in traverse_util.flatten_dict(state["intermediates"]).items():
        if path[-1] != "omega" or NAME not in path:
            continue
        at = path.index(NAME)
        site, rest = "/".join(path[:at]), path[at + 1 : -1]
        if rest:
            weights.setdefault(site, {})[rest] = values[-1]
        else:
            weights[site] = values[-1]
    return weights
