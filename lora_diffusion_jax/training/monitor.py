"""What the loop keeps track of: steps in flight, callbacks, speed and memory, LoRA sites."""

import contextlib
import dataclasses
import functools
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_diffusion_jax import processes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.interrupts import Interrupted, Interrupts, pause_point
from lora_diffusion_jax.training import writers
from lora_diffusion_jax.training.checkpoint import Checkpoints
from lora_diffusion_jax.training.feed import Feed
from lora_diffusion_jax.training.state import TrainState
from lora_diffusion_jax.training.writers import log

# Steps that may wait on the device: enough to keep it busy, few enough to stop at once.
IN_FLIGHT = 2

# (state, step) -> values to log (samples/... or eval/...; numbers, uint8 pictures) or None
Callback = Callable[[TrainState, int], Mapping[str, Any] | None]


class DivergedError(UserError):
    """The loss was not finite for too many steps in a row."""


@dataclasses.dataclass
class InFlight:
    """The steps that were started and not looked at yet."""

    checkpoints: Checkpoints
    progress: writers.Progress
    batch_size: int
    statuses: deque[tuple[int, jax.Array]] = dataclasses.field(default_factory=deque)
    seen: int | None = None  # the signal that a status reported

    def add(self, step: int, status: jax.Array) -> None:
        """Notes that a step was started, and waits for the one IN_FLIGHT before it."""
        self.statuses.append((step, status))
        self.drain(IN_FLIGHT)

    def drain(self, left: int = 0) -> None:
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
