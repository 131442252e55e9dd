"""What a run tells: metrics.jsonl, TensorBoard events, and a line of progress."""

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

from lora_diffusion_jax import processes
from lora_diffusion_jax.training.metrics import check_names
from lora_diffusion_jax.training.workdir import gone, plain_disk_errors, write_atomically

METRICS = "metrics.jsonl"
QUIET_SECONDS = 10.0  # where there is no terminal, say something at least this often


class Writers:
    """metrics.jsonl and TensorBoard of one run; does nothing in processes other than 0.

    A line of metrics.jsonl holds step, images, time (Unix seconds) and values by name; a line of a
    callback also holds its name as `callback`. TensorBoard's horizontal axis is images. Opening
    drops what a killed run wrote after the checkpoint that is now resumed.

    Args:
        directory: the workdir.
        step: the step that the run goes on from.
        images: images seen by then.
    """

    def __init__(self, directory: Path, step: int, images: int):
        self.path = directory / METRICS
        self.lines, self.events = None, None
        if not processes.is_leader():
            return
        with plain_disk_errors(directory):
            _drop_after(self.path, step)
            self.lines = self.path.open("ab", buffering=0)  # nothing is left over for closing
            self.events = _Events(directory, purge_from=images + 1)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if self.lines is None:
            return
        self.lines.close()
        try:
            self.events.close()
        except OSError:
            if kind is None:  # else the error on its way says it
                raise

    def write(
        self, step: int, images: int, values: Mapping[str, Any], callback: str | None = None
    ) -> None:
        """Writes one line; numbers go to both, pictures (uint8 [H, W, 3]) to TensorBoard alone.

        Raises:
            ValueError: a name outside the vocabulary.
            UserError: the disk takes no more, or the file is gone.
        """
        check_names(values)
        if self.lines is None:
            return
        scalars = {name: float(v) for name, v in values.items() if np.ndim(v) == 0}
        line = {"step": step, "images": images, "time": round(time.time(), 3)}
        if callback is not None:
            line["callback"] = callback
        # JSON has no NaN or infinity.
        line |= {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        if not self.path.exists():
            raise gone(self.path)
        with plain_disk_errors(self.path):
            self.lines.write((json.dumps(line) + "\n").encode())
            parts = [summary.scalar(name, value) for name, value in scalars.items()]
            parts += [
                summary.image(name, np.asarray(values[name]), dataformats="HWC")
                for name in values.keys() - scalars.keys()
            ]
            self.events.write(images, parts)


class _Events:
    """A TensorBoard event file, written at once.

    tensorboardX's SummaryWriter writes in a thread, whose death on a full disk it does not notice:
    its queue fills, and the program waits for ever.

    Args:
        directory: where the file is made.
        purge_from: events of an earlier file from this place of the axis on are void.
    """

    def __init__(self, directory: Path, purge_from: int):
        self.file = EventsWriter(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self.file.write_event(Event(step=purge_from, file_version="brain.Event:2"))
        self.file.write_event(Event(step=purge_from, session_log=start))
        self.file.flush()

    def write(self, step: int, summaries: Sequence[Any]) -> None:
        """Writes summaries (of tensorboardX.summary) at a place of the axis."""
        for values in summaries:
            self.file.write_event(Event(step=step, wall_time=time.time(), summary=values))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that was cut short; [] without a file."""
    path = Path(directory) / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def callbacks_done(directory: str | os.PathLike, step: int) -> set[str]:
    """The callbacks that finished at a step."""
    return {
        line["callback"]
        for line in read_metrics(directory)
        if line["step"] == step and "callback" in line
    }


def _drop_after(path: Path, step: int) -> None:
    """Cuts metrics.jsonl back to what belongs to the first `step` steps."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step]
    if path.exists() and path.read_text() != "".join(kept):
        write_atomically(path, "".join(kept))


def say(text: str) -> None:
    """Prints a line in process 0, above a bar where there is one."""
    if processes.is_leader():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every few seconds. Silent but in process 0.

    Args:
        total: images of the run.
        done: images seen before.
        quiet: say nothing at all.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False):
        self.silent = quiet or not processes.is_leader()
        self.total, self.done, self.first = total, done, done
        self.started: float | None = None  # when the first step was done
        self.spoke = time.monotonic()
        self.bar = None
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, images: int, loss: float) -> None:
        """Shows that this many images are done, and the loss of the last step known."""
        if self.started is None:  # compiling and the first step say nothing of the rate
            self.first, self.started = images, time.monotonic()
        fresh, self.done = images - self.done, images
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update(fresh)
        elif not self.silent and time.monotonic() - self.spoke > QUIET_SECONDS:
            rate = (images - self.first) / max(time.monotonic() - self.started, 1e-9)
            left = duration((self.total - images) / max(rate, 1e-9))
            self.say(
                f"{images:,} of {self.total:,} img | loss {loss:.4f} | {rate:.1f} img/s | "
                f"{left} left"
            )

    def say(self, text: str) -> None:
        """Prints a line, above the bar, unless this is a silent one."""
        self.spoke = time.monotonic()
        if not self.silent:
            say(text)


def duration(seconds: float) -> str:
    """'2d 03:10:00', '1:05:00' or '0:42'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
