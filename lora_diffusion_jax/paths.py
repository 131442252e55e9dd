"""Paths of parameters, such as 'model/enc/32x32_block0/qkv/lora/down/kernel'."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import traverse_util

ADAPTER = "lora"  # the name of an adapter's subtree below its site


def path_of(key_path: tuple) -> str:
    """'model/enc/conv/kernel' for a key path of jax.tree_util."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ADAPTER in path.split("/")


def list_sites(params: Any) -> list[str]:
    """Paths of the adapted layers in a parameter tree, sorted."""
    adapted = [path for path in traverse_util.flatten_dict(params) if ADAPTER in path]
    return sorted({"/".join(path[: path.index(ADAPTER)]) for path in adapted})


def list_adapters(
    paths: Iterable[tuple[str, ...]], site: str | None = None
) -> list[tuple[str, ...]]:
    """Where adapters are, of parameters' paths: those that end in `lora`, or in an adapter's name below it.

    Args:
        paths: of all parameters.
        site: the adapted layer's path; None: of all sites.
    """
    start = () if site is None else (*site.split("/"), ADAPTER)
    heads = [p[:-2] for p in paths if ADAPTER in p and p[-2:] == ("down", "kernel")]
    return [head for head in heads if head[: len(start)] == start]


def split(params: Any, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    """Splits nested dictionaries into the leaves whose path is chosen, and the rest."""
    flat = traverse_util.flatten_dict(params)
    first = {path: leaf for path, leaf in flat.items() if chosen("/".join(path))}
    rest = {path: leaf for path, leaf in flat.items() if path not in first}
    return traverse_util.unflatten_dict(first), traverse_util.unflatten_dict(rest)


def merge(first: Any, second: Any) -> Any:
    """The inverse of `split`; a leaf that both have is taken from the second."""
    flat = {**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)}
    return traverse_util.unflatten_dict(flat)
