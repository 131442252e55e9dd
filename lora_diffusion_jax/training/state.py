"""What a training step reads and writes, and the network variables in it."""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_diffusion_jax.array_types import PyTree, Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.paths import merge, split
from lora_diffusion_jax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """One run at one moment.

    Frozen weights have no optimizer state and no average: the two are trees of `params` alone.
    """

    step: Int[Array, ""]  # steps done, skipped ones included
    params: PyTree  # what is trained
    frozen: PyTree  # the other parameters
    buffers: PyTree  # constants of the network; never trained, never averaged
    opt_state: PyTree
    ema: PyTree  # average of params
    nonfinite_grads: Float[Array, ""]  # gradient entries replaced so far
    skipped_steps: Int[Array, ""]  # steps without update so far: their loss was not finite
    bad_in_row: Int[Array, ""]  # consecutive ones among these, up to the last step
    halted: Bool[Array, ""]  # too many in a row: nothing changes any more

    def images_seen(self, batch_size: int) -> Float[Array, ""]:
        """Images before this moment, float32: 2.5e9 of them do not fit into an int32."""
        return self.step.astype(jnp.float32) * batch_size


@flax.struct.dataclass
class SavedWeights:
    """What a checkpoint holds of a network: trained, frozen and constant arrays, and the average."""

    params: PyTree
    frozen: PyTree
    buffers: PyTree
    ema: PyTree


def create_state(
    variables: Variables, optimizer: Optimizer, trainable: Callable[[str], bool] = lambda path: True
) -> TrainState:
    """The state before the first step; the average starts as a copy of the weights.

    Args:
        variables: {'params', optional 'buffers'} of a network.
        optimizer: makes the optimizer state for the trained parameters.
        trainable: path of a parameter, like 'model/enc/qkv/lora/down/kernel' -> is it trained.

    Raises:
        UserError: nothing is trained.
    """
    params, frozen = split(variables["params"], trainable)
    if not jax.tree.leaves(params):
        raise UserError("No parameter is trained; check train.freeze_base and lora.mode.")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        buffers=variables.get("buffers", {}),
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        nonfinite_grads=jnp.zeros((), jnp.float32),
        skipped_steps=jnp.zeros((), jnp.int32),
        bad_in_row=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
    )


def assemble(params: PyTree, frozen: PyTree, buffers: PyTree) -> Variables:
    """The inverse of `split`, as variables for `apply`."""
    variables = {"params": merge(frozen, params)}
    return {**variables, "buffers": buffers} if buffers else variables


def raw_variables(weights: TrainState | SavedWeights) -> Variables:
    """The network as the last step left it."""
    return assemble(weights.params, weights.frozen, weights.buffers)


def ema_variables(weights: TrainState | SavedWeights) -> Variables:
    """The averaged network: the average of what is trained beside the frozen rest."""
    return assemble(weights.ema, weights.frozen, weights.buffers)
