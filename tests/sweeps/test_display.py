"""The table of a sweep that is running, on a terminal and elsewhere."""

import io
import json
import os
import re
import sys

import pytest

from lora_diffusion_jax import files
from lora_diffusion_jax.sweeps import display, state

UP = re.compile(r"\x1b\[(\d+)F\x1b\[J")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def entries(tmp_path):
    """A run with a line of metrics, one that failed, and ten that wait."""
    (tmp_path / "a").mkdir()
    line = {"step": 3, "images": 1500, "train/loss": 0.25, "perf/images_per_sec": 100.0}
    line |= {"perf/eta_sec": 45.0, "eval/fd_100": 3.5, "eval/fd_100_floor": 1.0}
    files.append(tmp_path / "a" / "metrics.jsonl", files.checked_line(json.dumps(line)))
    found = {
        "a": state.Entry({}, [], "running"),
        "b": state.Entry({}, [], "failed", "exit status 2\nx"),
    }
    return found | {f"waiting{k}": state.Entry({}, []) for k in range(10)}


def test_a_row_says_how_far_a_run_is(tmp_path, entries):
    table = display.Display(tmp_path, entries, dict.fromkeys(entries, 3000)).table().splitlines()
    assert table[1].split() == [
        *("a", "running", "1,500", "of", "3,000", "50", "%", "0.2500", "100.0", "0:00:45"),
        *("fd_100", "3.5"),
    ]
    assert table[2].split()[:2] == ["b", "failed"]
    assert len({line.index("of 3,000") for line in table[1:]}) == 1


def test_a_terminal_is_redrawn_and_shows_what_fits(tmp_path, entries, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    size = os.terminal_size((40, 9))
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: size)
    shown = display.Display(tmp_path, entries, {})
    shown.update()
    first = screen.getvalue().removeprefix("\x1b[J").splitlines()
    assert len(first) <= size.lines - 1
    assert all(len(line) < size.columns for line in first)
    assert [line.split()[0] for line in first[1:3]] == ["a", "b"]  # those that wait come last
    assert first[-1] == "10 waiting, 1 running, 1 failed"
    shown._printed = 0.0
    shown.update()
    assert int(UP.findall(screen.getvalue())[-1]) == len(first)
    shown.finish()
    assert all(name in screen.getvalue().rpartition("\x1b[J")[2] for name in entries)


def test_elsewhere_changes_are_lines(tmp_path, entries, capsys):
    shown = display.Display(tmp_path, entries, {})
    shown.update()
    assert capsys.readouterr().out.splitlines() == ["a  running  1,500  0.2500  100.0  0:00:45"]
    entries["waiting0"].state = "running"
    shown.update()
    shown.update()
    assert capsys.readouterr().out.splitlines() == ["waiting0: running"]
