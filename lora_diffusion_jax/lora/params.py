"""Surgery on parameter trees that hold a base and its adapters."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lora_diffusion_jax import paths
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lora.adapter import SCALES
from lora_diffusion_jax.paths import is_adapter, list_adapters, list_sites


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits {a: {kernel, lora: {...}}} into the base {a: {kernel}} and the adapters {a: {lora: ...}}."""
    adapters, base = paths.split(params, is_adapter)
    return base, adapters


def merge(base: PyTree, adapters: PyTree) -> PyTree:
    """The inverse of `split`.

    Raises:
        UserError: a parameter is in both trees.
    """
    flat, more = traverse_util.flatten_dict(base), traverse_util.flatten_dict(adapters)
    both = sorted("/".join(k) for k in set(flat) & set(more))
    if both:
        raise UserError(f"Base and adapters both hold {', '.join(both)}; split one of them first.")
    return paths.merge(base, adapters)


def select(params: PyTree, which: str = "adapters") -> PyTree:
    """A tree of booleans that is True at the adapters' leaves, or at the base's.

    Args:
        params: parameters.
        which: 'adapters', 'base' or 'all'.
    """
    if which not in ("adapters", "base", "all"):
        raise UserError(f"select got {which!r}; it takes 'adapters', 'base' or 'all'.")
    flat = traverse_util.flatten_dict(params)
    chosen = {k: which == "all" or is_adapter("/".join(k)) == (which == "adapters") for k in flat}
    return traverse_util.unflatten_dict(chosen)


def count(params: PyTree) -> int:
    """Number of scalar parameters; takes arrays or shapes (jax.eval_shape)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def with_scale(variables: PyTree, scale: jax.Array, pattern: str = ".*") -> PyTree:
    """Variables under which adapters add `scale` times as much; 0 switches them off.

    For sampling; an adapter's own `scale` is part of the adapter. Under `nn.scan` and `nn.vmap`, pass the
    collection `scales` on like the parameters.

    Args:
        variables: with `params` that hold adapters.
        scale: a factor [], or one per sample [B].
        pattern: regular expression for the whole paths of the adapters that are meant:
            .../qkv/lora, or .../qkv/lora/time for one of several at a site.

    Raises:
        UserError: no adapter has such a path.
    """
    flat = traverse_util.flatten_dict(variables["params"])
    adapters = list_adapters(flat)
    chosen = {path: scale for path in adapters if re.fullmatch(pattern, "/".join(path))}
    if not chosen:
        known = ", ".join(sorted("/".join(path) for path in adapters))
        raise UserError(f"The pattern {pattern!r} matches none of the adapters: {known or 'none'}.")
    scales = {(*path, "scale"): value for path, value in chosen.items()}
    return {**variables, SCALES: traverse_util.unflatten_dict(scales)}


def fold(params: PyTree, omegas: Mapping[str, Any]) -> PyTree:
    """Folds W + sum_i omega_i B_i A_i into the base for one fixed condition: what PEFT calls merging.

    Args:
        params: parameters with adapters beside Dense, DenseGeneral or Conv kernels.
        omegas: site path -> composition weights [m] (or [1, m]); `composition_weights` gives them.

    Returns:
        The base's tree, whose network gives what the unfolded one does under that condition.

    Raises:
        UserError: a site without weights, weights without a site, or of the wrong size.
    """
    base, adapters = split(params)
    flat_base, flat = traverse_util.flatten_dict(base), traverse_util.flatten_dict(adapters)
    sites = list_sites(adapters)
    if sites != sorted(omegas):
        raise UserError(
            f"fold got weights for {sorted(omegas)}, but the adapted sites are {sites}."
        )
    for site, omega in omegas.items():
        path = tuple(site.split("/"))
        for head in list_adapters(flat, site):
            weights = omega_of(omega, head, site)
            _fold_site(flat_base, flat, path, head, jnp.asarray(weights).reshape(-1))
    return traverse_util.unflatten_dict(flat_base)


def omega_of(omega: Any, head: tuple[str, ...], site: str) -> Any:
    """The composition weights of one adapter of a site.

    Args:
        omega: what `composition_weights` gives for the site: weights, or (adapter's name,) -> weights.
        head: the adapter's path, of `list_adapters`.
        site: the site's path.

    Raises:
        UserError: a mapping without the adapter.
    """
    if not isinstance(omega, Mapping):
        return omega
    name = head[len(site.split("/")) + 1 :]
    if name not in omega:
        found = ", ".join(map(repr, omega)) or "no adapter"
        wanted = f"its adapter {name!r}" if name else "its one adapter, which has no name: give [m]"
        raise UserError(f"Site '{site}' got weights for {found}; expected those of {wanted}.")
    return omega[name]


def _fold_site(
    flat_base: dict, flat: dict, path: tuple[str, ...], head: tuple[str, ...], omega: jax.Array
) -> None:
    """Adds one adapter's product, mixed by omega, to the kernel and bias at `path`, in place."""
    down, up = flat[*head, "down", "kernel"], flat[*head, "up", "kernel"]
    width = down.shape[-1]
    if width % omega.shape[0]:
        raise UserError(
            f"Site '{'/'.join(path)}' has {width} inner channels, which {omega.shape[0]} weights do not "
            "divide; give one weight per basis."
        )
    weights = jnp.repeat(omega, width // omega.shape[0])
    kernel = flat_base[*path, "kernel"]
    delta = jnp.tensordot(down * weights, up, axes=1)
    flat_base[*path, "kernel"] = kernel + delta.reshape(kernel.shape).astype(kernel.dtype)
    if (*head, "bias") in flat:
        shift = weights @ flat[*head, "bias"]
        bias = flat_base.get((*path, "bias"))
        if bias is None:
            raise UserError(
                f"Site '{'/'.join(path)}' has no bias to fold the adapter's bias into; "
                "keep the adapter unfolded."
            )
        flat_base[*path, "bias"] = bias + shift.reshape(bias.shape).astype(bias.dtype)
