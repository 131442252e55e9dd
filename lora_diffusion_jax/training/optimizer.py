"""Adam with a rate that ramps up over the images seen."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError

Rate = Callable[[Float[Array, ""]], Float[Array, ""]]  # images seen before the step -> rate


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A direction, any transformation of optax, and a rate that is a function of the images seen.

    The rate stands outside the transformation so that it depends on the images seen and not on the
    count of updates (a skipped step counts its images too), and so that it can be logged.
    """

    transform: optax.GradientTransformation  # gradients -> direction, without rate or sign
    rate: Rate

    def init(self, params: PyTree) -> PyTree:
        """The state of the direction: moments, counts."""
        return self.transform.init(params)

    def update(
        self, grads: PyTree, opt_state: PyTree, params: PyTree, images_seen: Float[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        """Returns (what to add to the parameters, next state)."""
        direction, opt_state = self.transform.update(grads, opt_state, params)
        rate = self.rate(images_seen)
        return jax.tree.map(lambda d: -rate.astype(d.dtype) * d, direction), opt_state


def ramp_up(learning_rate: float, rampup_images: float) -> Rate:
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
    restrict: Callable[[PyTree], PyTree] | None = None,
) -> Optimizer:
    """Adam (Kingma and Ba 2015, algorithm 1) with EDM's constants: 0.9, 0.999 and 1e-8.

    Args:
        learning_rate: > 0, reached after rampup_images.
        rampup_images: images over which the rate grows linearly from 0; 0: none.
        restrict: sets entries of the direction to zero, whose parameters then keep their values.

    Raises:
        UserError: a number out of its range.
    """
    if not learning_rate > 0 or rampup_images < 0:
        raise UserError(
            f"train.learning_rate is {learning_rate} and train.rampup_images {rampup_images}; the "
            "first must be above 0, the second at least 0."
        )
    # A chain of one: checkpoints hold its state as a sequence, to which other links can be added.
    direction = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    if restrict is not None:
        last = optax.stateless(lambda direction, params: restrict(direction))
        direction = optax.chain(direction, last)
    return Optimizer(direction, ramp_up(learning_rate, rampup_images))
