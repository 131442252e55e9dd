"""The mesh (data, fsdp), and the layout of arrays on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import place

AXES = ("data", "fsdp")
# Arrays with fewer entries stay whole on every device: gathering them costs more than they weigh.
# All of them together are 0.4 % of the CIFAR-10 network's state, 0.2 % of ImageNet-64's.
FSDP_MIN_SIZE = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices; a batch is split over both axes, large parameters over `fsdp`.

    Args:
        data: size of the data axis; -1 takes what fsdp leaves.
        fsdp: size of the fsdp axis, >= 1.
        devices: default: every device of every process.

    Raises:
        UserError: data * fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, asked = len(devices), f"data={data} x fsdp={fsdp}"
    if data == -1 and fsdp > 0:
        data = count // fsdp
    if min(data, fsdp) < 1 or data * fsdp != count:
        raise UserError(
            f"The mesh asks for {asked} devices, but there are {count} ({devices[0].platform}). "
            f"Choose sizes whose product is {count}, or data=-1 and an fsdp that divides it."
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def leaf_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The layout of one array of the training state.

    The largest axis that the fsdp axis divides is split (the last such axis on a tie), as in ZeRO-3
    (Rajbhandari et al. 2020); arrays below FSDP_MIN_SIZE entries, and those with no such axis, are
    replicated.
    """
    fsdp = mesh.shape["fsdp"]
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not fitting or np.prod(shape) < FSDP_MIN_SIZE:
        return PartitionSpec()
    axis = max(fitting)[1]
    return PartitionSpec(*[None] * axis, "fsdp")


def tree_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """`leaf_spec` for every leaf of a tree of arrays or shapes; the same tree of NamedShardings.

    Moments and averages have the shape of their parameter, so they are laid out like it.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf_spec(leaf.shape, mesh)), tree)


def gathered(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays that the mesh splits, whole on every device for their use in a network (ZeRO-3).

    Without this XLA carries the weights' layout over to the activations: it splits channels over
    `fsdp` instead of the batch, and ADM's step on 256 chips needs 37 GB of temporaries instead of 6.
    """
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def check_batch_size(batch_size: int, mesh: Mesh, microbatch: int | None = None) -> None:
    """Refuses a batch that the mesh cannot split evenly.

    Args:
        batch_size: images of one step over all devices.
        mesh: the mesh.
        microbatch: images of one forward and backward pass over all devices; None: the batch.

    Raises:
        UserError: with the numbers.
    """
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        near = max(devices, batch_size // devices * devices)
        raise UserError(
            f"batch_size {batch_size} cannot be split evenly over {devices} devices (mesh data="
            f"{mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); take {near} or {near + devices}."
        )
    possible = [m for m in range(devices, batch_size + 1, devices) if batch_size % m == 0]
    if microbatch is not None and microbatch not in possible:
        raise UserError(
            f"microbatch {microbatch} must divide batch_size {batch_size} and be a multiple of "
            f"the {devices} devices; possible: {possible}."
        )


def local_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " local"]:
    """The rows of the global batch that this process's devices hold, ascending."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[place] for place in places.values()]
    return np.unique(np.concatenate(rows))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays that all processes hold alike -> arrays that every device holds whole."""
    return jax.tree.map(lambda leaf: place(np.asarray(leaf), replicated(mesh)), tree)
