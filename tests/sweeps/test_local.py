"""Several runs at a time, with programs that only pretend to train."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.sweeps import local, state
from tests.small import ROOT
from tests.sweeps.pretend import CONFIG

STEPS = 3


def command(folder, what):
    return [sys.executable, "-m", "tests.sweeps.pretend", str(folder), str(STEPS), what]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(ROOT)


class Sweep:
    """Runs of `pretend` below a folder, by name."""

    def __init__(self, folder, **what):
        self.folder = folder
        self.entries = {
            name: state.Entry({}, command(folder / name, w)) for name, w in what.items()
        }
        self.most = 0  # that ran at the same time

    def run(self, jobs=2, when=lambda: None):
        def changed(states):
            self.most = max(self.most, list(self.states.values()).count("running"))
            when()

        configs = dict.fromkeys(self.entries, CONFIG)
        slots = [{"SLOT": str(k)} for k in range(jobs)]
        return local.Runner(self.folder, self.entries, configs, slots, changed).run()

    @property
    def states(self):
        return {name: entry.state for name, entry in self.entries.items()}


def test_runs_are_made_two_at_a_time_and_one_failure_stops_no_other(tmp_path):
    sweep = Sweep(tmp_path, a="ends", b="fails", c="ends", d="ends")
    assert sweep.run() is None
    assert sweep.states == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    assert sweep.most == 2
    assert sweep.entries["b"].detail.splitlines() == [
        "exit status 2",
        f"parent {os.getpid()}",
        "a first line",
        "error: the loss has a mind of its own",
    ]
    slots = [(tmp_path / name / local.LOG).read_text().split(" ")[1] for name in "abcd"]
    assert set(slots) == {"SLOT=0", "SLOT=1"}
    assert state.Watcher().look(tmp_path / "a").images == 30


def test_a_run_that_goes_on_reports_only_what_it_printed_last(tmp_path):
    sweep = Sweep(tmp_path, b="fails")
    sweep.run()
    sweep.entries["b"].state = "waiting"
    sweep.run()
    assert sweep.entries["b"].detail.count("mind of its own") == 1
    assert (tmp_path / "b" / local.LOG).read_text().count("mind of its own") == 2


def test_a_signal_stops_the_runs_which_save_first(tmp_path):
    sweep = Sweep(tmp_path, a="waits", b="waits", c="ends")

    def stop_once_both_wait():
        steps = [len(list((tmp_path / name).glob("checkpoints/*"))) for name in "ab"]
        if steps == [STEPS - 1] * 2 and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = []
    assert sweep.run(when=stop_once_both_wait) == signal.SIGTERM
    assert sweep.states == {"a": "stopped", "b": "stopped", "c": "waiting"}
    assert "saved and stopped" in (tmp_path / "a" / local.LOG).read_text()
    for entry in sweep.entries.values():
        entry.state = "waiting"
    for name in "ab":
        (tmp_path / name / "go").touch()
    assert sweep.run() is None
    assert set(sweep.states.values()) == {"done"}


def test_a_run_that_another_process_makes_is_waited_for_and_not_started_twice(tmp_path):
    orphan = subprocess.Popen(command(tmp_path / "a", "waits"), cwd=ROOT)
    while not state.holder(tmp_path / "a"):
        time.sleep(0.02)
    sweep = Sweep(tmp_path, b="ends", c="ends", a="ends")
    sweep.entries["a"].state, sweep.entries["a"].detail = "running", state.holder(tmp_path / "a")
    seen = []

    def let_it_go():
        seen.append(sweep.entries["a"].detail)
        if sweep.states["c"] == "done":
            (tmp_path / "a" / "go").touch()

    reaper = threading.Thread(target=orphan.wait)  # as init does for an orphan
    reaper.start()
    sweep.run(jobs=2, when=let_it_go)
    reaper.join()
    assert sweep.most == 2  # it counts
    assert f"process {orphan.pid}" in seen
    assert set(sweep.states.values()) == {"done"}
    assert not (tmp_path / "a" / local.LOG).exists()  # none of ours


def test_what_another_process_leaves_unfinished_is_finished(tmp_path):
    orphan = subprocess.Popen(command(tmp_path / "a", "waits"), cwd=ROOT)
    while not state.holder(tmp_path / "a"):
        time.sleep(0.02)
    sweep = Sweep(tmp_path, a="ends")

    def kill():
        if orphan.poll() is None and sweep.states["a"] == "running":
            orphan.kill()
            orphan.wait()

    sweep.run(when=kill)
    assert sweep.states == {"a": "done"}
    assert (tmp_path / "a" / local.LOG).exists()


def test_a_run_that_is_killed_is_a_failure_that_says_so(tmp_path):
    sweep = Sweep(tmp_path, a="waits")

    def kill():
        found = state.holder(tmp_path / "a")
        if found:
            os.kill(int(found.split()[1]), signal.SIGKILL)

    sweep.run(when=kill)
    assert sweep.states == {"a": "failed"}
    assert sweep.entries["a"].detail.startswith("killed by SIGKILL")


def test_a_run_is_done_when_its_samples_and_evaluation_are(tmp_path):
    sweep = Sweep(tmp_path, a="ends")
    sweep.run()
    assert state.is_done(tmp_path / "a", CONFIG)
    longer = {**CONFIG, "train": {"batch_size": 10, "total_images": 31}}
    assert not state.is_done(tmp_path / "a", longer)
    evaluated = {**CONFIG, "eval": {"num_samples": 10, "reference": ""}}
    assert not state.is_done(tmp_path / "a", evaluated)
    assert not state.is_done(tmp_path / "b", CONFIG)


def test_the_sweeps_file_keeps_every_run(tmp_path):
    entries = {
        "rank=1": state.Entry({"lora.rank": 1, "model.channel_mult": (1, 2)}, ["p", "a b"], "done"),
        "rank=2": state.Entry(
            {"sampler.s_max": float("inf")}, ["p"], "failed", "why", "12_3", False
        ),
    }
    state.write(tmp_path, entries)
    assert state.read(tmp_path) == entries
    assert entries["rank=1"].shell_command == "p 'a b'"
    assert state.read(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"runs": []}',
        '{"runs": {"a": 3}}',
        '{"runs": {"a": {"changes": {}, "command": ["x"], "other": 1}}}',
        '{"runs": {"a": {"changes": {}, "command": [3]}}}',
        '{"runs": {"a": {"changes": {}, "command": [], "state": "dancing"}}}',
        '{"runs": {"../a": {"changes": {}, "command": []}}}',
        '{"runs": {"..": {"changes": {}, "command": []}}}',
    ],
)
def test_a_damaged_file_is_a_plain_error(tmp_path, text):
    (tmp_path / state.FILE).write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json"):
        state.read(tmp_path)


def test_runs_that_are_not_asked_for_are_not_started(tmp_path):
    sweep = Sweep(tmp_path, a="ends", old="ends")
    sweep.entries["old"].listed = False
    assert sweep.run() is None
    assert sweep.states == {"a": "done", "old": "waiting"}
    assert not (tmp_path / "old").exists()


def test_a_run_with_nothing_to_compare_with_is_done_without_an_evaluation(tmp_path):
    sweep = Sweep(tmp_path, a="ends")
    sweep.run()
    evaluated = {**CONFIG, "eval": {"num_samples": 10, "reference": ""}}
    assert not state.is_done(tmp_path / "a", evaluated)  # of digits, which have held-out images
    assert state.is_done(tmp_path / "a", {**evaluated, "data": {"name": "", "eval_path": ""}})
