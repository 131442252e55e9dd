"""Where a run logs: metrics.jsonl, TensorBoard events, standard output and a progress bar."""

import abc
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from lora_diffusion_jax import files, processes, remote
from lora_diffusion_jax.training.metrics import check_names

METRICS = "metrics.jsonl"
COMMAND = "command.txt"  # in a workdir: what trains it, as a shell takes it
DAMAGED = "metrics.jsonl.damaged"  # lines that could not be read
PROGRESS_SECONDS = 10.0  # between lines of progress where there is no terminal


class Sink(abc.ABC):
    """Another place that a run logs to."""

    @abc.abstractmethod
    def write(self, images: int, step: int, values: Mapping[str, Any]) -> None:
        """Takes numbers, and pictures uint8 [H, W, C], by name; raises nothing."""

    @abc.abstractmethod
    def close(self, failed: bool) -> None:
        """Takes no more; raises nothing. `failed`: an error ends the run."""


class Writers:
    """metrics.jsonl, TensorBoard and sinks of one run; does nothing in processes other than 0.

    A line of metrics.jsonl holds step, images, time (Unix seconds), values by name, and its CRC-32; a
    line of a callback also holds its name as `callback`. TensorBoard's horizontal axis is images.
    Opening drops what a killed run wrote after the checkpoint that is now resumed, and moves lines
    that are damaged into a file of their own.

    Args:
        directory: the workdir.
        batch_size: images per step.
        step: the step that the run starts or resumes from.
        sinks: get what TensorBoard gets; they are closed with this.

    Attributes:
        done: the callbacks that had finished at that step.
    """

    def __init__(self, directory: Path, batch_size: int, step: int, sinks: Sequence[Sink] = ()):
        self.path, self.batch_size, self.sinks = directory / METRICS, batch_size, sinks
        self.lines, self.events, self.done = None, None, set()
        if not processes.is_leader():
            return
        with files.disk_errors(directory):
            os.close(files.open_own(self.path, os.O_WRONLY))  # an error if it is a link
            lines, damaged = files.read_lines(self.path)
            damaged += [json.dumps(line).encode() for line in lines if not _is_line(line)]
            kept = [line for line in lines if _is_line(line) and line["step"] <= step]
            self.done = {
                line["callback"] for line in kept if "callback" in line and line["step"] == step
            }
            if damaged:
                files.append(directory / DAMAGED, b"".join(line + b"\n" for line in damaged))
                log(
                    f"{self.path}: moved {len(damaged)} damaged lines to {DAMAGED}; the others stay"
                )
            data = b"".join(files.checked_line(json.dumps(line)) for line in kept)
            if self.path.exists() and self.path.read_bytes() != data:
                with files.atomic(self.path) as temporary:
                    temporary.write_bytes(data)
            descriptor = files.open_own(self.path, os.O_WRONLY | os.O_APPEND)
            self.lines = os.fdopen(
                descriptor, "ab", buffering=0
            )  # closing has nothing left to write
            self.events = _open_events(directory, purge_from=step * batch_size + 1)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        for sink in self.sinks:
            sink.close(kind is not None)
        if self.lines is None or self.events is None:
            return
        self.lines.close()
        try:
            self.events.close()
        except OSError:
            if kind is None:  # else the error being raised already says it
                raise

    def write(self, step: int, values: Mapping[str, Any], callback: str | None = None) -> None:
        """Writes one line; numbers go to both, pictures (uint8 [H, W, 3]) to TensorBoard alone.

        Raises:
            ValueError: a name outside the vocabulary.
            UserError: the disk is full, or the file has disappeared.
        """
        check_names(values)
        if self.lines is None or self.events is None:
            return
        scalars = {name: float(v) for name, v in values.items() if np.ndim(v) == 0}
        images = step * self.batch_size
        line: dict[str, Any] = {"step": step, "images": images, "time": round(time.time(), 3)}
        if callback is not None:
            line["callback"] = callback
        # JSON has no NaN or infinity.
        line |= {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        if not self.path.exists():
            raise files.disappeared(self.path)
        with files.disk_errors(self.path):
            self.lines.write(files.checked_line(json.dumps(line)))
            for name, value in values.items():
                if name in scalars:
                    item = summary.scalar(name, scalars[name])
                else:
                    item = summary.image(name, np.asarray(value), dataformats="HWC")
                self.events.write_event(Event(step=images, wall_time=time.time(), summary=item))
            self.events.flush()
        for sink in self.sinks:
            sink.write(images, step, values)


def _open_events(directory: Path, purge_from: int) -> EventsWriter:
    """A TensorBoard event file; what earlier files have from `purge_from` images on is void.

    Not tensorboardX's SummaryWriter: that writes in a thread, and does not notice when the thread
    dies on a full disk: its queue fills, and the program waits forever.
    """
    events = EventsWriter(str(directory / "events"))
    events.write_event(Event(step=purge_from, file_version="brain.Event:2"))
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=purge_from, session_log=start))
    events.flush()
    return events


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without checksums and damaged lines; [] without a file."""
    return [line for line in files.read_lines(Path(directory) / METRICS)[0] if _is_line(line)]


def _is_line(line: Mapping[str, Any]) -> bool:
    return type(line.get("step")) is int


def log(text: str) -> None:
    """Prints a line in process 0, above the progress bar if there is one."""
    if processes.is_leader():
        tqdm.write(remote.named(text), file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A tqdm bar on a terminal; elsewhere a line every few seconds. Does nothing but in process 0.

    Args:
        total: images of the run.
        done: images seen before.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.first = total, done, done
        self.started: float | None = None  # when the first step was done
        self.printed = time.monotonic()
        self.bar = None
        if processes.is_leader() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, images: int, loss: float) -> None:
        """Shows that this many images are done, and the loss of the last step known."""
        now = time.monotonic()
        if self.started is None:  # compiling and the first step do not count in the rate
            self.first, self.started = images, now
        new, self.done = images - self.done, images
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update(new)
        elif now - self.printed > PROGRESS_SECONDS and images > self.first:
            self.printed = now
            rate = (images - self.first) / max(now - self.started, 1e-9)
            left = duration((self.total - images) / max(rate, 1e-9))
            log(
                f"{images:,} of {self.total:,} img | loss {loss:.4f} | {rate:.1f} img/s | "
                f"{left} left"
            )


def duration(seconds: float) -> str:
    """'2 days, 3:10:00' or '0:00:42'."""
    return str(datetime.timedelta(seconds=round(min(seconds, 1e12))))
