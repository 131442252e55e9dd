"""The training loop: restore or begin, step, log, save, call back, stop when asked."""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from lora_diffusion_jax import processes
from lora_diffusion_jax.array_types import Key, PyTree
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts, pause_point
from lora_diffusion_jax.training import workdir as workdirs
from lora_diffusion_jax.training import writers
from lora_diffusion_jax.training.checkpoint import Checkpoints, from_parts, to_parts
from lora_diffusion_jax.training.feed import Batches, Feed
from lora_diffusion_jax.training.metrics import TrainMetrics, to_scalars
from lora_diffusion_jax.training.sharding import (
    Rules,
    check_batch_size,
    local_rows,
    put_batch,
    put_replicated,
    replicated,
    tree_sharding,
)
from lora_diffusion_jax.training.state import TRAIN, TrainState, purpose_key
from lora_diffusion_jax.training.step import StepFn, lower_step

# Steps that may wait on the device: enough to keep it busy, few enough to stop at once.
IN_FLIGHT = 2
# Seconds that a process may finish compiling before another: one may find it in its cache.
COMPILE_LIMIT = 3600.0

# (state, step) -> values to log (samples/... or eval/...; numbers, uint8 pictures) or None
Callback = Callable[[TrainState, int], Mapping[str, Any] | None]
Init = TrainState | Callable[[], TrainState]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in images; an event is due at the first step that reaches its multiple."""

    total_images: int
    log_every: int
    checkpoint_every: int
    sample_every: int = 0  # 0: never; the callback 'samples'
    eval_every: int = 0  # 0: never; the callback 'eval'
    keep: int = 3  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints kept for good besides; 0: none

    def __post_init__(self):
        for name in ("total_images", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("sample_every", "eval_every", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; give 0 for never.")

    def every(self, callback: str) -> int:
        """The cadence of a callback by its name."""
        return {"samples": self.sample_every, "eval": self.eval_every}[callback]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: TrainState
    step: int
    images: int
    stopped_by: int | None = None  # the signal that ended it early

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


class DivergedError(UserError):
    """The loss was not finite for too many steps in a row."""


def train(
    workdir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    init: Init,
    step_fn: StepFn,
    batches: Batches,
    mesh: Mesh,
    schedule: Schedule,
    seed: int,
    harmless: Sequence[str] = (),
    callbacks: Mapping[str, Callback] | None = None,
    flops_per_image: float | None = None,
    rules: Rules = (),
    device_bytes: int = 2**30,
    quiet: bool = False,
) -> Result:
    """Trains until total_images, or until SIGINT or SIGTERM; the same call again goes on.

    Killed at any moment, a run resumes from its last checkpoint to the same bits that it would have
    reached undisturbed: batches and keys are functions of (seed, step), and a checkpoint holds the
    metrics of the unfinished logging interval too.

    Args:
        workdir: the run's directory, made where missing.
        config: what config.json holds, JSON types alone.
        init: the state to begin with, or a function to compile that returns it; used when there is
            no checkpoint. Checkpoints of weights alone (step 0, imported) replace its weights.
        step_fn: (state, batch, key) -> (state, metrics), of `make_train_step`.
        batches: the data.
        mesh: of `make_mesh`.
        schedule: when to log, save and call back.
        seed: of the step's keys: key k = fold_in(fold_in(key(seed), TRAIN), k), k from 0.
        harmless: patterns of config fields whose change does not hinder resuming.
        callbacks: 'samples' and 'eval' -> function of (state, step). They run after the step's
            checkpoint was begun, and once more on resuming if they had not finished; their errors
            end the run.
        flops_per_image: of a training step, for perf/tflops_per_sec.
        rules: layout of parameters by path, before the default rule.
        device_bytes: largest data set that is copied onto every device.
        quiet: print nothing.

    Raises:
        UserError: the workdir, its config or the batch size do not fit; the disk is full; another
            process did not come in time.
        DivergedError: the loss stays NaN or infinite.
    """
    check_batch_size(batches.batch_size, mesh)
    processes.check_same("the config", json.dumps(config, sort_keys=True))
    say = (lambda text: None) if quiet else writers.say
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(workdirs.open_workdir(workdir))
        workdirs.reconcile_config(directory, config, harmless, say)
        keep_step = functools.partial(_due, schedule.keep_every, batch_size=batches.batch_size)
        checkpoints = Checkpoints(directory, keep=schedule.keep, keep_step=keep_step, say=say)
        stack.enter_context(checkpoints)
        step, state, interval = _begin(init, checkpoints, mesh, rules, say)
        _overview(directory, state, say)
        images, total = step * batches.batch_size, -(-schedule.total_images // batches.batch_size)
        loop = _Loop(
            directory=directory,
            checkpoints=checkpoints,
            writers=stack.enter_context(writers.Writers(directory, step, images)),
            progress=stack.enter_context(
                writers.Progress(total * batches.batch_size, images, quiet)
            ),
            feed=stack.enter_context(Feed(batches, mesh, step, device_bytes)),
            mesh=mesh,
            schedule=schedule,
            batch_size=batches.batch_size,
            total=total,
            callbacks=dict(callbacks or {}),
            flops_per_image=flops_per_image,
            state=state,
            interval=interval,
            step=step,
        )
        key = jax.jit(lambda: purpose_key(seed, TRAIN), out_shardings=replicated(mesh))()
        with plain_memory_errors(batches.batch_size):
            return loop.run(step_fn, rules, key)


def _due(every: int, step: int, batch_size: int) -> bool:
    """Whether the first `step` steps are the first to reach a multiple of `every` images."""
    if every == 0 or step == 0:
        return False
    return step * batch_size // every > (step - 1) * batch_size // every


def _begin(
    init: Init, checkpoints: Checkpoints, mesh: Mesh, rules: Rules, say: workdirs.Say
) -> tuple[int, TrainState, TrainMetrics]:
    """(step, state, metrics of the interval) from the newest checkpoint, or from `init`."""
    shapes = jax.eval_shape(init if callable(init) else lambda: init)
    layout = tree_sharding(shapes, mesh, rules)
    interval = empty_metrics(mesh)
    like = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, layout
    )
    found = checkpoints.restore(to_parts(like, jax.tree.map(_shape_of, interval)))
    if found is not None and "optimizer" in found[1]:
        state, interval = from_parts(found[1], like, interval)
        say(f"resuming from the checkpoint of step {found[0]:,}")
        return found[0], state, interval
    state = _place(init, layout)
    if found is not None:
        state, _ = from_parts(found[1], state, interval)
        say(f"starting from the weights of checkpoint {found[0]}")
    return 0, state, interval


def _shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _place(init: Init, layout: PyTree) -> TrainState:
    """The first state on the mesh, in buffers of its own: the step donates them."""
    if callable(init):
        return jax.jit(init, out_shardings=layout)()
    return jax.tree.map(lambda a, where: processes.place(np.array(a), where), init, layout)


def _overview(directory: Path, state: TrainState, say: workdirs.Say) -> None:
    """Writes the table of all parameters to parameters.txt and says how many there are."""
    tables = []
    for name, tree in (("trained", state.params), ("frozen", state.frozen)):
        count = sum(leaf.size for leaf in jax.tree.leaves(tree))
        if count:
            table = parameter_overview.get_parameter_overview(tree, include_stats=False)
            tables.append(f"{name} parameters: {count:,}\n{table}\n")
            say(f"{name} parameters: {count:,}")

    def write() -> None:
        with workdirs.plain_disk_errors(directory):
            workdirs.write_atomically(directory / "parameters.txt", "\n".join(tables))

    processes.from_leader("writing parameters.txt", write)


def empty_metrics(mesh: Mesh) -> TrainMetrics:
    """The metrics of no steps, in buffers of their own: the step donates them."""
    return put_replicated(jax.device_get(TrainMetrics.empty()), mesh)


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


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The state of a loop between its steps."""

    directory: Path
    checkpoints: Checkpoints
    writers: writers.Writers
    progress: writers.Progress
    feed: Feed
    mesh: Mesh
    schedule: Schedule
    batch_size: int
    total: int  # steps to do
    callbacks: Mapping[str, Callback]
    flops_per_image: float | None
    state: TrainState
    interval: TrainMetrics  # of the steps since the last line
    step: int  # steps done

    def __post_init__(self):
        self.flying: deque[tuple[int, jax.Array]] = deque()  # (steps done, status)
        self.saved = self.step  # step of the last checkpoint
        self.told_to_stop: int | None = None  # by the status of a step, which all processes see
        self.rows = local_rows(self.mesh.size, self.mesh)
        self.go_on = self._signals(0)
        self._start_clock()

    def run(self, step_fn: StepFn, rules: Rules, key: Key) -> Result:
        """All steps that are left."""
        with Interrupts() as interrupts:
            done = processes.from_leader(
                "reading which callbacks are done",
                lambda: sorted(writers.callbacks_done(self.directory, self.step)),
            )
            stopped_by = self._call_back(interrupts, skip=done)
            with contextlib.suppress(Interrupted):  # since the last callback, or with none
                pause_point()
            stopped_by = stopped_by or interrupts.agreed
        if self.step >= self.total:
            images = self.step * self.batch_size
            self.progress.say(f"{images:,} images are done; nothing is left to train")
        if self.step >= self.total or stopped_by is not None:
            return self._result(stopped_by)
        item = {**self.feed.next(), "stop": self.go_on}
        began = time.perf_counter()
        lowered = lower_step(
            step_fn, self.state, self.interval, self.feed.data, item, key, self.mesh, rules
        )
        traced = time.perf_counter() - began
        self.compiled = lowered.compile()
        compiled = time.perf_counter() - began - traced
        processes.barrier("compiling the step", COMPILE_LIMIT)
        with Interrupts() as interrupts:
            self.progress.say(f"compiled the step in {compiled:.1f} s (traced in {traced:.1f} s)")
            self._start_clock()
            stopped_by = self._steps(item, key, interrupts)
            self.checkpoints.wait()
            processes.barrier("the last checkpoint")
        if stopped_by is not None:
            self.progress.say(
                f"stopped by {signal.Signals(stopped_by).name} after step {self.step:,}, saved in "
                f"{self.directory}; the same command goes on from here"
            )
        return self._result(stopped_by)

    def _steps(self, item: PyTree, key: Key, interrupts: Interrupts) -> int | None:
        """Steps until the end or a signal, which it returns."""
        while True:
            self._advance(item, key)
            stopped_by = self._events(interrupts) or self._stopped_by(interrupts)
            if stopped_by is not None:
                self._save()
            if stopped_by is not None or self.step == self.total:
                return stopped_by
            stop = self._signals(interrupts.received) if interrupts.received else self.go_on
            item = {**self.feed.next(), "stop": stop}

    def _stopped_by(self, interrupts: Interrupts) -> int | None:
        """The signal to stop for after this step: one's own, or what all have seen."""
        return interrupts.received if processes.alone() else self.told_to_stop

    def _signals(self, number: int) -> jax.Array:
        """A step's argument that tells of a signal, or of none."""
        local = {"stop": np.full(len(self.rows), number, np.int32)}
        return put_batch(local, self.rows, self.mesh.size, self.mesh)["stop"]

    def _result(self, stopped_by: int | None) -> Result:
        return Result(self.state, self.step, self.step * self.batch_size, stopped_by)

    def _advance(self, item: PyTree, key: Key) -> None:
        """Starts one step and waits for the one IN_FLIGHT before it."""
        self.checkpoints.check()
        with jax.transfer_guard("disallow"):
            self.state, self.interval, status = self.compiled(
                self.state, self.interval, self.feed.data, item, key
            )
        self.step += 1
        self.flying.append((self.step, status))
        self._land(IN_FLIGHT)

    def _land(self, left: int) -> None:
        """Waits until at most `left` steps are under way, and looks at those that ended.

        Raises:
            DivergedError: a step found the limit of bad steps in a row reached.
        """
        while len(self.flying) > left:
            step, status = self.flying.popleft()
            loss, bad_in_row, halted, stop = jax.device_get(status)
            self.told_to_stop = self.told_to_stop or int(stop) or None
            if halted:
                first = step - int(bad_in_row) + 1
                raise DivergedError(
                    f"The loss was NaN or infinite in {int(bad_in_row)} steps in a row, from step "
                    f"{first} to {step}. These steps changed nothing; the last checkpoint is of step "
                    f"{self.saved}. Lower the learning rate or clip gradients, in a new workdir "
                    f"with init_from={self.directory}."
                )
            self.progress.update(step * self.batch_size, loss)

    def _events(self, interrupts: Interrupts) -> int | None:
        """What is due after this step; returns a signal that cut it short."""
        last = self.step == self.total
        if last or self._is_due(self.schedule.log_every):
            self._log()
        if last or self._is_due(self.schedule.checkpoint_every):
            self._save()
        return self._call_back(interrupts)

    def _save(self) -> None:
        """Begins the checkpoint of this step, unless that was done."""
        if self.saved == self.step:
            return
        self._land(0)  # a diverged state is not saved
        began = time.perf_counter()
        self.checkpoints.save(self.step, to_parts(self.state, self.interval))
        self.saved = self.step
        self.held_up += time.perf_counter() - began

    def _is_due(self, every: int) -> bool:
        return _due(every, self.step, self.batch_size)

    def _callback_due(self, name: str) -> bool:
        every = self.schedule.every(name)
        return every > 0 and self.step > 0 and (self.step == self.total or self._is_due(every))

    def _call_back(self, interrupts: Interrupts, skip: Collection[str] = ()) -> int | None:
        """Runs the callbacks that are due and writes what they return.

        A signal cuts them short, and is returned.
        """
        for name, function in self.callbacks.items():
            if not self._callback_due(name) or name in skip:
                continue
            self._land(0)
            began = time.perf_counter()
            try:
                values = interrupts.cut_short(lambda f=function: f(self.state, self.step))
            except Interrupted:  # no line is written, so that resuming runs it
                return interrupts.agreed or interrupts.received
            spent = time.perf_counter() - began
            self.paused += spent
            values = {**(values or {}), "callback/seconds": spent}
            self.writers.write(self.step, self.step * self.batch_size, values, callback=name)
            shown = [f"{k} {v:.5g}" for k, v in values.items() if np.ndim(v) == 0]
            self.progress.say(" | ".join([f"step {self.step:,}: {name}", *shown]))
        return None

    def _start_clock(self) -> None:
        self.began, self.began_step = time.perf_counter(), self.step
        self.waited_before = self.feed.waited
        self.paused = self.held_up = 0.0  # seconds in callbacks, in saving

    def _log(self) -> None:
        """Writes the line of the interval that ends here, and starts the next."""
        self._land(0)
        interval, bad, skipped = jax.device_get(
            (self.interval, self.state.nonfinite_grads, self.state.skipped_steps)
        )
        values = to_scalars(interval) | {
            "train/nonfinite_grads": float(bad),
            "train/skipped_steps": float(skipped),
        }
        values |= self._speed()
        images = self.step * self.batch_size
        self.writers.write(self.step, images, values)
        self.progress.say(_line(self.step, images, values))
        self.interval = empty_metrics(self.mesh)
        self._start_clock()

    def _speed(self) -> dict[str, float]:
        steps = max(self.step - self.began_step, 1)
        wall = max(time.perf_counter() - self.began - self.paused, 1e-9)
        rate = steps * self.batch_size / wall
        values = {
            "perf/images_per_sec": rate,
            "perf/sec_per_step": wall / steps,
            "perf/input_wait": (self.feed.waited - self.waited_before) / wall,
            "perf/checkpoint_wait": self.held_up / wall,
            "perf/eta_sec": (self.total - self.step) * self.batch_size / rate,
        }
        if self.flops_per_image is not None:
            values["perf/tflops_per_sec"] = rate * self.flops_per_image / 1e12
        return values | _memory()


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


def _line(step: int, images: int, values: Mapping[str, float]) -> str:
    """The line of a log for people."""
    parts = [f"step {step:,}", f"{images:,} img"]
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.4f}")
    parts.append(f"{values['perf/images_per_sec']:.1f} img/s")
    if "perf/tflops_per_sec" in values:
        parts.append(f"{values['perf/tflops_per_sec']:.3f} TFLOP/s")
    if values["train/skipped_steps"]:
        parts.append(f"{values['train/skipped_steps']:.0f} steps skipped")
    parts.append(f"{writers.duration(values['perf/eta_sec'])} left")
    return " | ".join(parts)
