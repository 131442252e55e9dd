"""The training loop: begin or resume, then step, log, save and call back, until the end or a signal."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from clu.metrics import Collection
from jax.sharding import Mesh

from lora_diffusion_jax import files, paths, processes
from lora_diffusion_jax.array_types import Key, PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.keys import INIT, TRAIN, purpose_key
from lora_diffusion_jax.processes.interrupts import Interrupts
from lora_diffusion_jax.training import writers
from lora_diffusion_jax.training.checkpoint import Checkpoints, from_parts, to_parts
from lora_diffusion_jax.training.feed import Batches, Feed, take
from lora_diffusion_jax.training.metrics import TrainMetrics, to_scalars
from lora_diffusion_jax.training.monitor import Callback, Callbacks, Clock, InFlight, describe_sites
from lora_diffusion_jax.training.sharding import (
    batch_sharding,
    put_replicated,
    replicated,
    tree_sharding,
)
from lora_diffusion_jax.training.state import TrainState
from lora_diffusion_jax.training.step import StepFn
from lora_diffusion_jax.training.writers import log

# Seconds that a process may finish compiling before another: one may find it in its cache.
COMPILE_LIMIT = 3600.0

# The state to begin with, or a function from the key of INIT to it, which is compiled
InitialState = TrainState | Callable[[Key], TrainState]


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When things happen, in images; an event is due at the first step that reaches its multiple."""

    total_images: int
    log_every: int
    checkpoint_every: int
    sample_every: int = 0  # 0: never; the callback 'samples'
    eval_every: int = 0  # 0: never; the callback 'eval'
    keep: int = 3  # newest checkpoints that are kept

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("sample_every", "eval_every") else 1
            if value < least:
                raise UserError(f"train.{name} is {value}; it must be at least {least}.")

    def steps(self, batch_size: int) -> int:
        """The number of steps of the whole run."""
        return -(-self.total_images // batch_size)

    def due(self, step: int, batch_size: int) -> set[str]:
        """The events after a number of steps: log, checkpoint, samples, eval; all after the last."""
        every = {"log": self.log_every, "checkpoint": self.checkpoint_every}
        every |= {"samples": self.sample_every, "eval": self.eval_every}
        images, last = step * batch_size, step == self.steps(batch_size)
        return {
            event
            for event, n in every.items()
            if n and step and (last or images // n > (images - batch_size) // n)
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: TrainState
    step: int
    stopped_by: int | None = None  # the signal that ended it early

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def train(
    directory: Path,
    *,
    init: InitialState,
    step_fn: StepFn,
    batches: Batches,
    mesh: Mesh,
    cadence: Cadence,
    seed: int,
    callbacks: Mapping[str, Callback] | None = None,
    flops_per_image: float | None = None,
    metrics: type[Collection] = TrainMetrics,
    sinks: Sequence[writers.Sink] = (),
) -> Result:
    """Trains until total_images, or until SIGINT or SIGTERM; the same call again resumes.

    Killed at any moment, a run resumes bit-exactly from its last checkpoint: batches and keys are
    functions of (seed, step), and a checkpoint also holds the metrics of the unfinished interval.

    Args:
        directory: the run's directory, of `open_workdir`.
        init: the state of step 0, or a function from the key of INIT to it; used when there is no
            checkpoint. Checkpoints of weights alone (step 0, imported) replace its weights.
        step_fn: (state, batch, key) -> (state, metrics), of `make_train_step`.
        batches: the data.
        mesh: of `make_mesh`.
        cadence: when to log, save and call back.
        seed: of the fresh weights, and of the step's keys: key k = fold_in(fold_in(key(seed), TRAIN), k),
            k from 0.
        callbacks: 'samples' and 'eval' -> function of (state, step). They run after the step's
            checkpoint was begun, and again on resuming if they had not finished; their errors end
            the run.
        flops_per_image: of a training step, for perf/tflops_per_sec.
        metrics: what step_fn measures.
        sinks: where it is logged to, besides the workdir; they are closed.

    Raises:
        UserError: the disk is full, a step does not fit into memory, a process did not come in time.
        DivergedError: the loss stays NaN or infinite.
    """
    batch_size, total = batches.batch_size, cadence.steps(batches.batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_memory_errors(batch_size))
        checkpoints = stack.enter_context(Checkpoints(directory, keep=cadence.keep))
        step, state, interval = _begin(init, seed, checkpoints, mesh, metrics)
        _write_overview(directory, state)
        writer = stack.enter_context(writers.Writers(directory, batch_size, step, sinks))
        progress = stack.enter_context(writers.Progress(total * batch_size, step * batch_size))
        feed = stack.enter_context(Feed(batches, mesh, step))
        in_flight = InFlight(checkpoints, progress, batch_size)
        calls = Callbacks(callbacks or {}, writer)
        clock = Clock(feed, checkpoints, calls, total, flops_per_image)

        stopped_by = calls.catch_up(cadence.due(step, batch_size), state, step)
        if step >= total:
            log(f"{step * batch_size:,} images are done; nothing is left to train")
        if step >= total or stopped_by is not None:
            return Result(state, step, stopped_by)

        # Outside of Interrupts: a signal while the step compiles ends the program at once.
        key = _replicated_key(seed, TRAIN, mesh)
        item, began = feed.next(), time.perf_counter()
        lowered = jit_step(step_fn, state, mesh).lower(state, interval, feed.data, item, key)
        compiled = _compile(lowered, traced=time.perf_counter() - began)

        clock.lap(step)
        with Interrupts() as interrupts:
            while True:
                checkpoints.check()  # a full disk ends the run here, not at the next checkpoint
                with jax.transfer_guard("disallow"):  # a hidden transfer would stall every step
                    state, interval, status = compiled(state, interval, feed.data, item, key)
                step += 1
                in_flight.add(step, status)
                if due := cadence.due(step, batch_size):
                    in_flight.drain()  # a diverged state is neither logged nor saved
                if "log" in due:
                    _log(writer, clock, step, state, interval)
                    interval = empty_metrics(mesh, metrics)
                if "checkpoint" in due:
                    checkpoints.save(step, to_parts(state, interval))
                stopped_by = calls.run(due, state, step, interrupts) or in_flight.signal(interrupts)
                if stopped_by is not None or step == total:
                    break
                item = feed.next(interrupts.received)
            in_flight.drain()
            checkpoints.save(step, to_parts(state, interval))  # unless that was due anyway
            checkpoints.wait()
            processes.barrier("the last checkpoint")  # all write their part before any exits
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            log(f"stopped by {name} after step {step:,}; rerun the same command to resume")
        return Result(state, step, stopped_by)


def jit_step(step_fn: StepFn, state: TrainState, mesh: Mesh) -> Any:
    """Makes one program of a step and what surrounds it; the first two arguments are donated.

    The program is (state, interval, data, item, key) -> (state, interval, status [4]). It gathers the
    batch, folds the step into the key, steps, and adds to the metrics of the interval. status: loss of
    the step (NaN if skipped), bad steps in a row, halted, the greatest signal that a process was told
    to stop by; so all processes learn of it at the same step, without any other communication.

    Args:
        step_fn: of `make_train_step`.
        state: arrays or shapes.
        mesh: the devices.
    """

    def train_step(
        state: TrainState, interval: Collection, data: PyTree, item: PyTree, key: Key
    ) -> tuple[TrainState, Collection, jax.Array]:
        batch, key = take(data, item), jax.random.fold_in(key, state.step)
        state, measured = step_fn(state, batch, key)
        status = (measured.loss.compute(), state.bad_in_row, state.halted, item["signal"].max())
        status = jnp.stack([value.astype(jnp.float32) for value in status])
        return state, interval.merge(measured), status

    layout, whole = tree_sharding(state, mesh), replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(layout, whole, whole, batch_sharding(mesh), whole),
        out_shardings=(layout, whole, whole),
        donate_argnums=(0, 1),
    )


def _compile(lowered: jax.stages.Lowered, traced: float) -> jax.stages.Compiled:
    """Compiles, and waits until all processes have done so."""
    began = time.perf_counter()
    compiled = lowered.compile()
    log(f"compiled the step in {time.perf_counter() - began:.1f} s (traced in {traced:.1f} s)")
    processes.barrier("compiling the step", COMPILE_LIMIT)
    return compiled


def _replicated_key(seed: int, purpose: int, mesh: Mesh) -> Key:
    """The key of a purpose on all devices."""
    return jax.jit(lambda: purpose_key(seed, purpose), out_shardings=replicated(mesh))()


def _begin(
    init: InitialState, seed: int, checkpoints: Checkpoints, mesh: Mesh, metrics: type[Collection]
) -> tuple[int, TrainState, Collection]:
    """(step, state, metrics of the interval) from the newest checkpoint, or from `init`."""
    key = jax.eval_shape(lambda: jax.random.key(seed))
    shapes = jax.eval_shape(init if callable(init) else lambda key: init, key)
    layout, interval = tree_sharding(shapes, mesh), empty_metrics(mesh, metrics)
    like = jax.tree.map(lambda shape, where: shape.update(sharding=where), shapes, layout)
    found = checkpoints.restore(to_parts(like, interval))
    if found is not None and "optimizer" in found[1]:
        log(f"resuming from the checkpoint of step {found[0]:,}")
        return found[0], *from_parts(found[1], like, interval)
    # In buffers of its own: the step donates them.
    if callable(init):
        # As a constant of the program the key would have it compiled anew for every seed. Lowering for
        # the key's shape reuses the trace made for `shapes`; a key on the mesh would be traced anew.
        program = jax.jit(init, in_shardings=replicated(mesh), out_shardings=layout).lower(key)
        state = program.compile()(_replicated_key(seed, INIT, mesh))
    else:
        state = jax.tree.map(lambda a, where: processes.place(np.array(a), where), init, layout)
    if found is not None:
        state, _ = from_parts(found[1], state, interval)
        log(f"starting from the weights of checkpoint {found[0]}")
    return 0, state, interval


def _write_overview(directory: Path, state: TrainState) -> None:
    """Writes the table of all parameters to parameters.txt and logs how many there are."""
    tables = []
    for name, tree in (("trained", state.params), ("frozen", state.frozen)):
        count = sum(leaf.size for leaf in jax.tree.leaves(tree))
        if count:
            table = parameter_overview.get_parameter_overview(tree, include_stats=False)
            tables.append(f"{name} parameters: {count:,}\n{table}\n")
            log(f"{name} parameters: {count:,}")

    log(describe_sites(paths.list_sites(paths.merge(state.params, state.frozen))))

    def write() -> None:
        with files.disk_errors(directory):
            files.write_text(directory / "parameters.txt", "\n".join(tables))

    processes.from_leader("writing parameters.txt", write)


def empty_metrics(mesh: Mesh, metrics: type[Collection] = TrainMetrics) -> Collection:
    """The metrics of no steps, in buffers of their own: the step donates them."""
    return put_replicated(jax.device_get(metrics.empty()), mesh)


@contextlib.contextmanager
def plain_memory_errors(batch_size: int) -> Iterator[None]:
    """Turns a device's lack of memory for a step into a UserError that says what needs less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"A step of {batch_size} images does not fit into the devices' memory "
            f"({str(error).splitlines()[0]}). Compute it in parts (train.microbatch="
            f"{max(1, batch_size // 8)} or less), or with train.remat=blocks, dtype=bfloat16, or more "
            "devices (mesh.fsdp). What was saved before is untouched."
        ) from error


def _log(
    writer: writers.Writers, clock: Clock, step: int, state: TrainState, interval: Collection
) -> None:
    """Writes the line of the interval that ends here."""
    interval, bad, skipped = jax.device_get((interval, state.nonfinite_grads, state.skipped_steps))
    values = to_scalars(interval) | clock.lap(step)
    values |= {"train/nonfinite_grads": float(bad), "train/skipped_steps": float(skipped)}
    writer.write(step, values)
    shown = {
        "loss {:.4f}": values.get("train/loss"),
        "{:.1f} img/s": values["perf/images_per_sec"],
        "{:.3f} TFLOP/s": values.get("perf/tflops_per_sec"),
        "{} steps skipped": int(skipped) or None,
        "{} left": writers.duration(values["perf/eta_sec"]),
    }
    known = [text.format(value) for text, value in shown.items() if value is not None]
    log(" | ".join([f"step {step:,}", f"{step * writer.batch_size:,} img", *known]))
