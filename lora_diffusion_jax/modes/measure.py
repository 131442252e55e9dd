"""Time and memory of a network's evaluation and of its training step on the devices at hand."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory import networks, training
from lora_diffusion_jax.training import loop, sharding
from lora_diffusion_jax.training.state import TrainState, assemble

SECONDS = 5.0  # spent on repeating what is timed
MAX_REPEATS = 20
# On a CPU, large networks take seconds an image: no more FLOP than this in an evaluation that is timed.
CPU_EVALUATION = 2e11


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one call that computes some images over all devices."""

    seconds: float
    images: int

    def of(self, images: float) -> float:
        """Seconds of so many images at this rate."""
        return self.seconds * images / self.images


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device during a step.

    Attributes:
        state: parameters, moments and their average.
        data: the data set where it lies on the devices, else the batch.
        work: gradients and activations.
        compiled: whether `work` comes from the compiled step; else it is what a traced step keeps for
            its backward pass.
    """

    state: int
    data: int
    work: int
    compiled: bool = True

    @property
    def total(self) -> int:
        """All of them."""
        return self.state + self.data + self.work


@dataclasses.dataclass(frozen=True)
class Step:
    """What was found out about the training step.

    Attributes:
        batch: images of the step that was looked at.
        memory: what it needs.
        compile_seconds: tracing and compiling; None: not compiled.
        timed: None: not run, because it is too large or does not fit.
        exhausted: whether compiling or running it took more memory than there is.
    """

    batch: int
    memory: Memory
    compile_seconds: float | None = None
    timed: Timed | None = None
    exhausted: bool = False


def images_at_once(limit: float, flops: float, mesh: Mesh) -> int:
    """How many images of so many FLOP each stay below a limit; a multiple of the devices."""
    return max(1, int(limit / max(flops, 1.0)) // mesh.size) * mesh.size


def time_evaluation(
    config: ConfigDict, denoiser: Denoiser, mesh: Mesh, cpu_flops: float | None
) -> Timed:
    """Times evaluations of the network as a sampling run makes them.

    Args:
        config: of a run.
        denoiser: its network.
        mesh: the devices.
        cpu_flops: of an image, which bounds how many are computed at a time; None: sampler.batch_size.

    Raises:
        UserError: an evaluation does not fit into the devices' memory.
    """
    generator = training.build_generator(config, denoiser, mesh)
    denoiser = generator.denoiser  # as these devices run it
    images = generator.call_size
    if cpu_flops is not None:
        images = min(images, images_at_once(CPU_EVALUATION, cpu_flops, mesh))
    whole, spread = sharding.replicated(mesh), NamedSharding(mesh, P(mesh.axis_names))
    classes = networks.num_classes(config)
    x = jax.ShapeDtypeStruct((images, *networks.image_shape(config)), jnp.float32)
    labels = jax.ShapeDtypeStruct((images, classes), jnp.float32) if classes else None

    def call(variables: PyTree, x: jax.Array, labels: Any) -> Any:
        return denoiser.apply(variables, x, jnp.ones(()), labels)

    variables = networks.variable_shapes(config, denoiser)
    compiled = jax.jit(call, in_shardings=(whole, spread, spread))
    arguments = (zeros(variables, whole), zeros(x, spread), zeros(labels, spread))
    try:
        return Timed(seconds_of(lambda: compiled(*arguments)), images)
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise UserError(
            f"An evaluation of {images} images does not fit into the devices' memory; lower "
            "sampler.batch_size."
        ) from error


def measure_step(
    config: ConfigDict, denoiser: Denoiser, mesh: Mesh, num_images: int, part: int
) -> Step:
    """Compiles the training step and runs it on blank images.

    Args:
        config: of a run.
        denoiser: its network.
        mesh: the devices.
        num_images: of the data set; 0 where that is not known.
        part: images of the step; fewer than the batch are computed without accumulation.
    """
    batch = config.train.batch_size
    if part < batch:
        config = config.copy_and_resolve_references()
        config.train.batch_size, config.train.microbatch = part, 0
    shapes = training.step_arguments(config, denoiser, mesh, num_images)
    began = time.perf_counter()
    step_fn = training.build_step(config, denoiser, mesh)
    memory, compile_seconds = Memory(*state_bytes(shapes, mesh), work=0, compiled=False), None
    try:
        compiled = loop.jit_step(step_fn, shapes[0], mesh).lower(*shapes).compile()
        memory, compile_seconds = memory_of(compiled, shapes, mesh), time.perf_counter() - began
        room = free_memory(mesh)
        if room is not None and memory.total > room:
            return Step(part, memory, compile_seconds, exhausted=True)
        seconds = _run(compiled, shapes, mesh)
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        return Step(part, memory, compile_seconds, exhausted=True)
    return Step(part, memory, compile_seconds, Timed(seconds, part))


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device's memory did not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _run(compiled: Any, shapes: tuple[Any, ...], mesh: Mesh) -> float:
    """Seconds of a compiled step; its state is handed on, as in training."""
    whole, layout = sharding.replicated(mesh), sharding.tree_sharding(shapes[0], mesh)
    state, interval = zeros(shapes[0], layout), zeros(shapes[1], whole)
    data, item = zeros(shapes[2], whole), zeros(shapes[3], sharding.batch_sharding(mesh))
    key = jax.device_put(jax.random.key(0), whole)

    def step() -> Any:
        nonlocal state, interval
        state, interval, status = compiled(state, interval, data, item, key)
        return status

    return seconds_of(step)


def trace_step(config: ConfigDict, denoiser: Denoiser, mesh: Mesh, num_images: int) -> Step:
    """What a step keeps in memory for its backward pass, without compiling it.

    That is close to what a CPU needs; compilers for GPUs and TPUs keep less.
    """
    shapes = training.step_arguments(config, denoiser, mesh, num_images)
    start, classes = shapes[0], networks.num_classes(config)
    objective = training.build_objective(config, denoiser)
    images = config.train.microbatch or config.train.batch_size

    def backward(start: TrainState) -> Any:
        x = jnp.zeros((images, *networks.image_shape(config)))
        labels = jnp.zeros((images, classes)) if classes else None
        draws = objective.draw(jax.random.key(0), x.shape)

        def loss(params: PyTree) -> jax.Array:
            variables = assemble(params, start.frozen, start.buffers)
            terms = objective.loss(variables, x, labels, draws, True)
            return sum(jax.tree.leaves(jax.tree.map(jnp.sum, terms)), jnp.zeros(()))

        return jax.vjp(loss, start.params)[1]

    kept = jax.eval_shape(backward, start)
    state, data = state_bytes(shapes, mesh)
    work = nbytes(kept) // mesh.size + nbytes(start.params)  # and the gradients
    return Step(config.train.batch_size, Memory(state, data, work, compiled=False))


# Memory.


def nbytes(tree: PyTree) -> int:
    """The size of all arrays or shapes of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(shapes: tuple[Any, ...], mesh: Mesh) -> tuple[int, int]:
    """Bytes on each device of the state, and of the data set and the batch."""
    state, _, data, item, _ = shapes

    def part(leaf: Any, where: NamedSharding) -> int:
        return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    layout = sharding.tree_sharding(state, mesh)
    parts = jax.tree.leaves(jax.tree.map(part, state, layout))
    return sum(parts), nbytes(data) + nbytes(item) // mesh.size


def memory_of(compiled: Any, shapes: tuple[Any, ...], mesh: Mesh) -> Memory:
    """What a compiled step needs on each device, as XLA laid it out."""
    found = compiled.memory_analysis()
    state, data = state_bytes(shapes, mesh)
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    return Memory(state, data, max(0, total - state - data))


def free_memory(mesh: Mesh) -> int | None:
    """Bytes that each device has for a run: a CPU's share of what the host has free; None: unknown."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        free = host_memory()
        return None if free is None else free // mesh.size
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory() -> int | None:
    """Bytes of memory that programs can still take; None where Linux's /proc/meminfo is missing."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")]
    return found[0] if found else None


# Running.


def zeros(shapes: PyTree, where: Any) -> PyTree:
    """Arrays of zeros; `where` is a sharding, or a tree of them."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, shapes)
    return jax.tree.map(lambda s, w: jnp.zeros(s.shape, s.dtype, device=w), shapes, where)


def seconds_of(call: Callable[[], Any]) -> float:
    """Mean seconds of a call after the first, which may compile and allocate."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - began
    repeats = min(MAX_REPEATS, int(SECONDS / once))
    if repeats < 2:
        return once
    began = time.perf_counter()
    for _ in range(repeats):
        last = call()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / repeats
