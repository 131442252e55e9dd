"""Adam with a rate that ramps up over images seen, and groups of parameters chosen by path."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.sharding import path_of

Groups = Sequence[tuple[str, str]]  # (regular expression of a path, name of the group)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A direction from optax and a rate that is a function of the images seen before the step.

    The rate stands outside the chain so that it follows the images seen, not the count of updates
    (a skipped step counts its images too), and so that it can be logged.
    """

    transform: optax.GradientTransformation  # gradients -> direction, without rate or sign
    rate: Callable[[Float[Array, ""]], Float[Array, ""]]  # images seen before the step -> rate

    def init(self, params: PyTree) -> PyTree:
        """The state of the direction: moments, counts."""
        return self.transform.init(params)

    def update(
        self, grads: PyTree, opt_state: PyTree, params: PyTree, images_seen: Float[Array, ""]
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        """Returns (what to add to the parameters, next state, the rate used)."""
        direction, opt_state = self.transform.update(grads, opt_state, params)
        rate = self.rate(images_seen)
        return jax.tree.map(lambda d: -rate.astype(d.dtype) * d, direction), opt_state, rate


def ramp_up(learning_rate: float, rampup_images: float) -> Callable[..., Float[Array, ""]]:
    """rate(n) = learning_rate * min(n / rampup_images, 1), n the images seen before the step.

    The first step has rate 0, as in EDM (Karras et al. 2022, appendix F.2); rampup_images = 0
    gives the constant rate from the start.
    """

    def rate(images_seen: Float[Array, ""]) -> Float[Array, ""]:
        if rampup_images == 0:
            return jnp.float32(learning_rate)
        return jnp.float32(learning_rate) * jnp.minimum(images_seen / rampup_images, 1.0)

    return rate


def adam(
    learning_rate: float,
    *,
    rampup_images: float = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    rate_factors: Sequence[tuple[str, float]] = (),
) -> Optimizer:
    """Adam (Kingma and Ba 2015, algorithm 1) with EDM's settings.

    Args:
        learning_rate: > 0, reached after rampup_images.
        rampup_images: images over which the rate grows linearly from 0; 0: none.
        b1: decay of the first moment per step.
        b2: decay of the second moment per step.
        eps: added to the root of the second moment.
        weight_decay: decoupled (Loshchilov and Hutter 2019); 0: none.
        clip_norm: gradients are scaled down to this global norm first; None: not.
        rate_factors: (regular expression of a path, factor of the rate); the first that is found
            in a path counts, and every parameter must be claimed by one. Empty: factor 1.

    Raises:
        UserError: a number out of its range; a parameter that no factor claims (when first used).
    """
    if not learning_rate > 0 or rampup_images < 0 or weight_decay < 0:
        raise UserError(
            f"Optimizer: learning_rate {learning_rate} must be above 0, rampup_images "
            f"{rampup_images} and weight_decay {weight_decay} at least 0."
        )
    parts = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    if rate_factors:
        names = [(pattern, pattern) for pattern, _ in rate_factors]
        scales = {pattern: optax.scale(factor) for pattern, factor in rate_factors}
        parts.append(optax.partition(scales, lambda params: claim(params, names)))
    return Optimizer(optax.chain(*parts), ramp_up(learning_rate, rampup_images))


def claim(params: PyTree, groups: Groups) -> PyTree:
    """The tree of group names: each leaf belongs to the first group found in its path.

    Raises:
        UserError: a leaf that no group claims, or a group that claims no leaf.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [
        next((name for pattern, name in groups if re.search(pattern, path)), None) for path in paths
    ]
    orphans = [path for path, name in zip(paths, names, strict=True) if name is None]
    if orphans:
        raise UserError(
            f"{len(orphans)} of {len(paths)} parameters belong to no group, '{orphans[0]}' for "
            f"one; the groups are {[pattern for pattern, _ in groups]}. Add a last group '.*' for "
            "the rest."
        )
    empty = [pattern for pattern, name in groups if name not in names]
    if empty:
        raise UserError(
            f"The group(s) {empty} claim no parameter; paths look like '{paths[0]}'. Mend the "
            "expression or remove the group."
        )
    return jax.tree.unflatten(jax.tree.structure(params), names)
