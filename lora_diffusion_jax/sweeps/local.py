"""Runs of a sweep on this machine, several at a time, each in a process of its own."""

import collections
import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax import files
from lora_diffusion_jax.processes.interrupts import SIGNALS, Interrupts
from lora_diffusion_jax.sweeps import state
from lora_diffusion_jax.sweeps.devices import Environment

LOG = "log.txt"  # in a run's directory: what it prints
LAST_LINES = 6  # of a failed run's output that are reported
POLL_SECONDS = 0.5
_TAIL_BYTES = 16_384


@dataclasses.dataclass
class Child:
    """A run's process, the environment variables it got, and where its output begins in the log."""

    process: subprocess.Popen
    slot: Environment
    log_start: int


def start(command: Sequence[str], directory: Path, name: str, slot: Environment) -> Child:
    """Starts a run, which appends what it prints to its log.

    It gets a session of its own: signals of the terminal reach it through us alone.
    """
    folder = directory / name
    with files.disk_errors(folder):
        files.make_folder(folder, directory)
        given = "".join(f"{variable}={shlex.quote(value)} " for variable, value in slot.items())
        files.append(folder / LOG, f"$ {given}{shlex.join(command)}\n".encode())
        log = files.open_own(folder / LOG, os.O_WRONLY | os.O_APPEND)
        try:
            log_start = os.fstat(log).st_size
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot},
                start_new_session=True,
            )
        finally:
            os.close(log)
    return Child(process, slot, log_start)


class Runner:
    """Starts the runs that are waiting, follows them, and keeps their states up to date.

    Args:
        directory: of the sweep.
        entries: all its runs; those whose state is 'waiting' are started, in this order. Runs that another
            process is at work on, such as one that a killed sweep left behind, are waited for, and
            count among those at a time.
        configs: of the runs, by name: JSON types alone.
        slots: environment variables for each of the runs at a time.
        changed: called after every look at the runs; True if a state has changed.
    """

    def __init__(
        self,
        directory: Path,
        entries: Mapping[str, state.Entry],
        configs: Mapping[str, Mapping[str, Any]],
        slots: Sequence[Environment],
        changed: Callable[[bool], None],
    ):
        self.directory, self.entries, self.configs = directory, entries, configs
        self.changed = changed
        self.free = collections.deque(slots)
        self.children: dict[str, Child] = {}
        self.others: dict[str, Environment | None] = {}  # at work without us -> the slot they take
        for name in configs:
            if entries[name].state == "running":
                self.others[name] = self.free.popleft() if self.free else None

    def run(self) -> int | None:
        """Returns when all runs have ended, or after a signal: its number.

        A signal is passed on to the runs, which save a checkpoint before they end.
        """
        with Interrupts("stopping the runs, which save first") as interrupts:
            told = False
            while True:
                changed = self._reap() | self._look_at_others()
                if interrupts.received is None:
                    changed |= self._start()
                elif not told:
                    told = True
                    for child in self.children.values():
                        child.process.send_signal(signal.SIGTERM)
                self.changed(changed)
                waiting = self.others if interrupts.received is None else {}
                if not (self.children or waiting):
                    return interrupts.received
                time.sleep(POLL_SECONDS)

    def _start(self) -> bool:
        """Starts runs while there are free slots."""
        waiting = [
            n for n, entry in self.entries.items() if entry.state == "waiting" and entry.listed
        ]
        started = waiting[: len(self.free)]
        for name in started:
            entry, slot = self.entries[name], self.free.popleft()
            entry.state, entry.detail = "running", state.holder(self.directory / name)
            if entry.detail:
                self.others[name] = slot
            else:
                self.children[name] = start(entry.command, self.directory, name, slot)
        return bool(started)

    def _reap(self) -> bool:
        """Notes how runs have ended."""
        ended = [name for name, child in self.children.items() if child.process.poll() is not None]
        for name in ended:
            child = self.children.pop(name)
            if child.process.returncode and (holder := state.holder(self.directory / name)):
                # A process that an earlier sweep left had not locked its directory yet.
                self.entries[name].detail = holder
                self.others[name] = child.slot
                continue
            self.free.append(child.slot)
            self._note_end(name, child.process.returncode, child.log_start)
        return bool(ended)

    def _note_end(self, name: str, status: int, log_start: int) -> None:
        entry = self.entries[name]
        number = -status if status < 0 else status - 128
        if status == 0 and state.is_done(self.directory / name, self.configs[name]):
            entry.state, entry.detail = "done", ""
        elif number in SIGNALS:
            entry.state, entry.detail = "stopped", f"by {signal.Signals(number).name}"
        else:
            entry.state = "failed"
            entry.detail = f"{ending(status)}\n{last_lines(self.directory / name / LOG, log_start)}"

    def _look_at_others(self) -> bool:
        """Takes over the runs of which the other process has ended."""
        ended = [name for name in self.others if not state.holder(self.directory / name)]
        for name in ended:
            if (slot := self.others.pop(name)) is not None:
                self.free.append(slot)
            done = state.is_done(self.directory / name, self.configs[name])
            self.entries[name].state = "done" if done else "waiting"
            self.entries[name].detail = ""
        return bool(ended)


def ending(status: int) -> str:
    """How a process ended, by its return code."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def last_lines(path: Path, start: int = 0) -> str:
    """The last lines that a run printed, from a position in its log on."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])
