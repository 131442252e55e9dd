"""All that a training step reads and writes, and the variables for a network that it holds."""

from collections.abc import Callable, Iterable
from typing import Protocol

import flax
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from lora_diffusion_jax.array_types import Key, PyTree, Variables
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.optimizer import Optimizer

# Purposes of random numbers in training; a purpose never changes its number.
INIT, TRAIN = 0, 1


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
    bad_in_row: Int[Array, ""]  # of these, the last ones in a row
    halted: Bool[Array, ""]  # too many in a row: nothing changes any more

    def images_seen(self, batch_size: int) -> Float[Array, ""]:
        """Images before this moment, float32: 2.5e9 of them do not fit into an int32."""
        return self.step.astype(jnp.float32) * batch_size


class Weights(Protocol):
    """What a network can be assembled from: a TrainState, or a checkpoint opened for reading."""

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
        UserError: nothing is trained; a collection that training cannot keep.
    """
    unknown = set(variables) - {"params", "buffers"}
    if unknown:
        raise UserError(
            f"The network has variables {sorted(unknown)}; training keeps 'params' and 'buffers' "
            "only. Move them to 'buffers' if they are constants."
        )
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


def split(params: PyTree, chosen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Splits nested dictionaries into the leaves whose path 'a/b/c' is chosen, and the rest."""
    flat = traverse_util.flatten_dict(params)
    first = {path: leaf for path, leaf in flat.items() if chosen("/".join(path))}
    rest = {path: leaf for path, leaf in flat.items() if path not in first}
    return traverse_util.unflatten_dict(first), traverse_util.unflatten_dict(rest)


def assemble(params: PyTree, frozen: PyTree, buffers: PyTree) -> Variables:
    """The inverse of `split`, as variables for `apply`."""
    merged = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(params)}
    variables = {"params": traverse_util.unflatten_dict(merged)}
    return {**variables, "buffers": buffers} if buffers else variables


def raw_variables(weights: Weights) -> Variables:
    """The network as the last step left it."""
    return assemble(weights.params, weights.frozen, weights.buffers)


def ema_variables(weights: Weights) -> Variables:
    """The averaged network: the average of what is trained beside the frozen rest."""
    return assemble(weights.ema, weights.frozen, weights.buffers)


def purpose_key(seed: int, purpose: int) -> Key:
    """The key of one purpose; the key of step k is fold_in of it with k."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def has_adapters(paths: Iterable[str]) -> bool:
    """Whether one of the paths belongs to an adapter: 'lora' is one of its parts."""
    return any("lora" in path.split("/") for path in paths)
