"""The progress of all runs of a sweep: one table that is redrawn, or lines where there is no terminal."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lora_diffusion_jax.evaluation.tables import align
from lora_diffusion_jax.sweeps.state import STATES, Entry, Progress, Watcher
from lora_diffusion_jax.training.writers import PROGRESS_SECONDS, duration

_RIGHT = (2, 3, 4, 5, 6)  # columns of numbers
_FIRST = ("running", "failed", "stopped", "submitted", "waiting", "done")  # where not all rows fit


class Display:
    """Shows the runs of a sweep while they run.

    Args:
        directory: of the sweep.
        entries: its runs.
        totals: images of each run, by name.
    """

    def __init__(self, directory: Path, entries: Mapping[str, Entry], totals: Mapping[str, int]):
        self.directory, self.entries, self.totals = directory, entries, totals
        self.watcher = Watcher()
        self.terminal = sys.stdout.isatty()
        self._lines = 0  # on the terminal, to be redrawn
        self._told = {name: entry.state for name, entry in entries.items()}
        self._images: dict[str, int] = {}  # of each run when its progress was last printed
        self._printed = 0.0

    def update(self) -> None:
        """Redraws the table; without a terminal, prints what has changed, and progress now and then."""
        now = time.monotonic()
        if self.terminal:
            if now - self._printed > 1:
                self._printed = now
                self._redraw(self._fitting())
            return
        for name, entry in self.entries.items():
            if entry.state != self._told[name]:
                self._told[name] = entry.state
                print(f"{name}: {_state(entry)}", flush=True)
        if now - self._printed > PROGRESS_SECONDS:
            self._printed = now
            for name, entry in self.entries.items():
                images = self.watcher.look(self.directory / name).images
                if entry.state == "running" and images > self._images.get(name, 0):
                    self._images[name] = images
                    print("  ".join(filter(None, self._row(name)[:-1])), flush=True)

    def finish(self) -> None:
        """Prints the table of all runs."""
        if self.terminal:
            self._redraw([])
        print(self.table(), flush=True)

    def table(self) -> str:
        """All runs, as lines of text."""
        return align(self._rows(list(self.entries)), _RIGHT)

    def _rows(self, names: list[str]) -> list[list[str]]:
        head = ["run", "state", "images", "", "loss", "img/s", "left", "metrics"]
        return [head, *map(self._row, names)]

    def _row(self, name: str) -> list[str]:
        entry, progress = self.entries[name], self.watcher.look(self.directory / name)
        total, values = self.totals.get(name, 0), progress.values
        loss, rate = values.get("train/loss"), values.get("perf/images_per_sec")
        left = values.get("perf/eta_sec") if entry.state == "running" else None
        return [
            name,
            _state(entry),
            f"{progress.images:,} of {total:,}" if total else f"{progress.images:,}",
            f"{100 * progress.images / total:.0f} %" if total else "",
            "" if loss is None else f"{loss:.4f}",
            "" if rate is None else f"{rate:.1f}",
            "" if left is None else duration(left),
            _metrics(progress),
        ]

    def _fitting(self) -> list[str]:
        """The table, cut to the terminal; runs at work come first if not all fit."""
        width, height = shutil.get_terminal_size()
        names = list(self.entries)
        if len(names) > height - 3:
            names.sort(key=lambda name: _FIRST.index(self.entries[name].state))
            names = names[: max(1, height - 3)]
        lines = align(self._rows(names), _RIGHT).splitlines()
        counts = Counter(entry.state for entry in self.entries.values())
        lines.append(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
        return [line[: width - 1] for line in lines]

    def _redraw(self, lines: list[str]) -> None:
        up = f"\x1b[{self._lines}F" if self._lines else ""
        sys.stdout.write(f"{up}\x1b[J" + "".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self._lines = len(lines)


def _state(entry: Entry) -> str:
    first = entry.detail.partition("\n")[0]
    if entry.state in ("running", "submitted", "stopped") and first:
        return f"{entry.state} ({first})"
    return entry.state


def _metrics(progress: Progress) -> str:
    """The newest results of the evaluation during training, with their names."""
    found = {
        name.removeprefix("eval/"): value
        for name, value in progress.values.items()
        if name.startswith("eval/") and not name.endswith(("_floor", "_ceiling"))
    }
    return ", ".join(f"{k} {v:.5g}" for k, v in found.items() if v is not None)
