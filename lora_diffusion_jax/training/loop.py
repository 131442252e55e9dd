"""The training loop: begin or resume, then step, log, save and call back, until the end or a signal."""

import contextlib
import dataclasses
import functools
import resource
import signal
import sys
import time
from collections import deque
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
from lora_diffusion_jax.keys import TRAIN, purpose_key
from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts, pause_point
from lora_diffusion_jax.training import writers
from lora_diffusion_jax.training.checkpoint import Checkpoints, from_parts, to_parts
from lora_diffusion_jax.training.feed import Batches, Feed, take
from lora_diffusion_jax.training.metrics import TrainMetrics, to_scalars
from lora_diffusion_jax.training.sharding import (
    batch_sharding,
    put_replicated,
    replicated,
    tree_sharding,
)
from lora_diffusion_jax.training.state import TrainState
from lora_diffusion_jax.training.step import StepFn
from lora_diffusion_jax.training.writers import log

# Steps that may wait on the device: enough to keep it busy, few enough to stop at once.
IN_FLIGHT = 2
# Seconds that a process may finish compiling before another: one may find it in its cache.
COMPILE_LIMIT = 3600.0

# (state, step) -> values to log (samples/... or eval/...; numbers, uint8 pictures) or None
Callback = Callable[[TrainState, int], Mapping[str, Any] | None]
# The state to begin with, or a function to compile that returns it
InitialState = TrainState | Callable[[], TrainState]


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


class DivergedError(UserError):
    """The loss was not finite for too many steps in a row."""


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
) -> Result:
    """Trains until total_images, or until SIGINT or SIGTERM; the same call again resumes.

    Killed at any moment, a run resumes bit-exactly from its last checkpoint: batches and keys are
    functions of (seed, step), and a checkpoint also holds the metrics of the unfinished interval.

    Args:
        directory: the run's directory, of `open_workdir`.
        init: used when there is no checkpoint. Checkpoints of weights alone (step 0, imported)
            replace its weights.
        step_fn: (state, batch, key) -> (state, metrics), of `make_train_step`.
        batches: the data.
        mesh: of `make_mesh`.
        cadence: when to log, save and call back.
        seed: of the step's keys: key k = fold_in(fold_in(key(seed), TRAIN), k), k from 0.
        callbacks: 'samples' and 'eval' -> function of (state, step). They run after the step's
            checkpoint was begun, and again on resuming if they had not finished; their errors end
            the run.
        flops_per_image: of a training step, for perf/tflops_per_sec.
        metrics: what step_fn measures.

    Raises:
        UserError: the disk is full, a step does not fit into memory, a process did not come in time.
        DivergedError: the loss stays NaN or infinite.
    """
    batch_size, total = batches.batch_size, cadence.steps(batches.batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_memory_errors(batch_size))
        checkpoints = stack.enter_context(Checkpoints(directory, keep=cadence.keep))
        step, state, interval = _begin(init, checkpoints, mesh, metrics)
        _write_overview(directory, state)
        writer = stack.enter_context(writers.Writers(directory, batch_size, step))
        progress = stack.enter_context(writers.Progress(total * batch_size, step * batch_size))
        feed = stack.enter_context(Feed(batches, mesh, step))
        flight = Flight(checkpoints, progress, batch_size)
        calls = Callbacks(callbacks or {}, writer)
        clock = Clock(feed, checkpoints, calls, total, flops_per_image)

        stopped_by = calls.catch_up(cadence.due(step, batch_size), state, step)
        if step >= total:
            log(f"{step * batch_size:,} images are done; nothing is left to train")
        if step >= total or stopped_by is not None:
            return Result(state, step, stopped_by)

        # Outside of Interrupts: a signal while the step compiles ends the program at once.
        key = jax.jit(lambda: purpose_key(seed, TRAIN), out_shardings=replicated(mesh))()
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
                flight.add(step, status)
                if due := cadence.due(step, batch_size):
                    flight.land()  # a diverged state is neither logged nor saved
                if "log" in due:
                    _log(writer, clock, step, state, interval)
                    interval = empty_metrics(mesh, metrics)
                if "checkpoint" in due:
                    checkpoints.save(step, to_parts(state, interval))
                stopped_by = calls.run(due, state, step, interrupts) or flight.signal(interrupts)
                if stopped_by is not None or step == total:
                    break
                item = feed.next(interrupts.received)
            flight.land()
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


@dataclasses.dataclass
class Flight:
    """The steps that were started and not looked at yet."""

    checkpoints: Checkpoints
    progress: writers.Progress
    batch_size: int
    statuses: deque[tuple[int, jax.Array]] = dataclasses.field(default_factory=deque)
    seen: int | None = None  # the signal that a status told of

    def add(self, step: int, status: jax.Array) -> None:
        """Notes that a step was started, and waits for the one IN_FLIGHT before it."""
        self.statuses.append((step, status))
        self.land(IN_FLIGHT)

    def land(self, left: int = 0) -> None:
        """Waits until at most `left` steps are under way, and looks at those that are done.

        Raises:
            DivergedError: a step reached the limit of bad steps in a row.
        """
        while len(self.statuses) > left:
            step, status = self.statuses.popleft()
            loss, bad_in_row, halted, number = jax.device_get(status)
            self.seen = self.seen or int(number) or None
            if halted:
                saved, workdir = self.checkpoints.latest_step(), self.checkpoints.directory.parent
                start = "" if saved is None else f" and init_from={workdir}, of step {saved}"
                raise DivergedError(
                    f"The loss was NaN or infinite in {int(bad_in_row)} steps in a row, from step "
                    f"{step - int(bad_in_row) + 1} to {step}. These steps changed nothing. Train in "
                    f"another workdir, with a lower train.learning_rate{start}."
                )
            self.progress.update(step * self.batch_size, loss)

    def signal(self, interrupts: Interrupts) -> int | None:
        """The signal to stop for; several processes stop at the step whose status told them all."""
        return interrupts.received if processes.alone() else self.seen


@dataclasses.dataclass
class Callbacks:
    """Runs the callbacks that are due and writes what they return."""

    functions: Mapping[str, Callback]
    writer: writers.Writers
    seconds: float = 0.0  # spent in them so far

    def catch_up(self, due: set[str], state: TrainState, step: int) -> int | None:
        """Runs those that a killed run left undone; returns a signal that came meanwhile."""
        with Interrupts() as interrupts:
            done = processes.from_leader("listing callbacks", lambda: sorted(self.writer.done))
            stopped_by = self.run(due - set(done), state, step, interrupts)
            with contextlib.suppress(Interrupted):  # since the last callback, or without any
                pause_point()
            return stopped_by or interrupts.agreed

    def run(
        self, due: set[str], state: TrainState, step: int, interrupts: Interrupts
    ) -> int | None:
        """Runs those whose names are due; a signal cuts them short, and is returned."""
        for name, function in self.functions.items():
            if name not in due:
                continue
            began = time.perf_counter()
            try:
                values = interrupts.cut_short(functools.partial(function, state, step))
            except Interrupted:  # no line is written, so that resuming runs it
                return interrupts.stopped_by
            spent = time.perf_counter() - began
            self.seconds += spent
            values = {**(values or {}), "callback/seconds": spent}
            self.writer.write(step, values, callback=name)
            shown = [f"{k} {v:.5g}" for k, v in values.items() if np.ndim(v) == 0]
            log(" | ".join([f"step {step:,}: {name}", *shown]))
        return None


@dataclasses.dataclass
class Clock:
    """Measures speed, and what input and checkpoints cost, from lap to lap."""

    feed: Feed
    checkpoints: Checkpoints
    callbacks: Callbacks  # whose time is left out of the speed
    total: int  # steps of the run
    flops_per_image: float | None  # of a training step
    mark: tuple[float, ...] = (0.0,) * 5

    def lap(self, step: int) -> dict[str, float]:
        """The perf/ values since the last lap; the next one starts here, after `step` steps."""
        waits = self.feed.waited, self.checkpoints.waited, self.callbacks.seconds
        now, batch_size = (step, time.perf_counter(), *waits), self.feed.batches.batch_size
        steps, wall, input_wait, checkpoint_wait, in_callbacks = np.subtract(now, self.mark)
        self.mark = now
        wall = max(wall - in_callbacks, 1e-9)
        rate = max(steps, 1) * batch_size / wall
        values = {
            "perf/images_per_sec": rate,
            "perf/sec_per_step": batch_size / rate,
            "perf/input_wait": input_wait / wall,
            "perf/checkpoint_wait": checkpoint_wait / wall,
            "perf/eta_sec": (self.total - step) * batch_size / rate,
        }
        if self.flops_per_image is not None:
            values["perf/tflops_per_sec"] = rate * self.flops_per_image / 1e12
        return values | _memory()


def _begin(
    init: InitialState, checkpoints: Checkpoints, mesh: Mesh, metrics: type[Collection]
) -> tuple[int, TrainState, Collection]:
    """(step, state, metrics of the interval) from the newest checkpoint, or from `init`."""
    shapes = jax.eval_shape(init if callable(init) else lambda: init)
    layout, interval = tree_sharding(shapes, mesh), empty_metrics(mesh, metrics)
    like = jax.tree.map(lambda shape, where: shape.update(sharding=where), shapes, layout)
    found = checkpoints.restore(to_parts(like, interval))
    if found is not None and "optimizer" in found[1]:
        log(f"resuming from the checkpoint of step {found[0]:,}")
        return found[0], *from_parts(found[1], like, interval)
    # In buffers of its own: the step donates them.
    if callable(init):
        state = jax.jit(init, out_shardings=layout)()
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


def describe_sites(sites: Sequence[str]) -> str:
    """'3 LoRA sites: a/b (qkv, proj), a/c (qkv)'."""
    layers: dict[str, list[str]] = {}
    for site in sites:
        block, _, layer = site.rpartition("/")
        layers.setdefault(block, []).append(layer)
    listed = [
        f"{block} ({', '.join(names)})" if block else ", ".join(names)
        for block, names in layers.items()
    ]
    return f"{len(sites)} LoRA sites" + (f": {', '.join(listed)}" if sites else "")


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


def _memory() -> dict[str, float]:
    """Largest use of memory so far, in GB (1e9 bytes)."""
    # ru_maxrss counts kilobytes, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    values = {"perf/host_memory_gb": peak / 1e9}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        values["perf/device_memory_gb"] = stats["peak_bytes_in_use"] / 1e9
    return values
