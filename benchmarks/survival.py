"""Kills one training run again and again, resumes it each time, and compares its end with the end of
a run that was left alone: every bit of parameters, moments, EMA, counters, and metrics.jsonl.

python -m benchmarks.survival [--kills=20] [--processes=1|2] [--steps=200] [--seed=0]

The run is `main.py --mode=train` of a small network on the digits, with a checkpoint every 3 steps, so
that most kills fall into saving. A kill is a kill -9 at a random moment of the start or of training;
with several processes it hits all of them or one, and the others then have to end by themselves. One
line per kill, one JSON line at the end; the exit status is 1 where the ends differ.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
EVERY = 3  # steps from checkpoint to checkpoint
CONFIG = {
    "model.channels": 8,
    "model.channel_mult": "(1,)",
    "model.attn_resolutions": "(8,)",
    "lora.rank": 2,
    "lora.bases": 3,
    "lora.widths": "(16, 8)",
    "train.batch_size": BATCH,
    "train.log_every": 4 * BATCH,
    "train.checkpoint_every": EVERY * BATCH,
    "train.sample_every": 0,
    "eval.num_samples": 0,
}
# Moments of kills are drawn from: seconds of the start; seconds after some checkpoint of training.
START_SECONDS, TRAIN_SECONDS = 5.0, 0.5
PATIENCE = 300.0  # seconds until a process that should end or begin is given up
CLOCKED = ("time", "callback/seconds")  # fields of metrics.jsonl that no two runs have alike


@dataclasses.dataclass
class Run:
    """One training run, started as often as need be."""

    workdir: Path
    home: Path  # of the data set and the compiled programs
    processes: int
    steps: int

    def start(self) -> list[subprocess.Popen]:
        """Starts all processes of the run; what they say goes to log-I beside the workdir."""
        fields = {**CONFIG, "train.total_images": self.steps * BATCH, "data.data_dir": self.home}
        command = [sys.executable, "main.py", "--mode=train", "--config=configs/digits.py"]
        command += [f"--workdir={self.workdir}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.home / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        port, started = free_port(), []
        for index in range(self.processes):
            several = [f"--coordinator_address=127.0.0.1:{port}"]
            several += [f"--num_processes={self.processes}", f"--process_id={index}"]
            more = several if self.processes > 1 else []
            with self.log(index).open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [*command, *more], cwd=ROOT, env=environment, stdout=log, stderr=log
                    )
                )
        return started

    def log(self, index: int = 0) -> Path:
        """Where a process's words go."""
        return self.workdir.with_name(f"{self.workdir.name}-log-{index}")

    def words(self) -> str:
        """What all processes said since the last start."""
        return "\n".join(self.log(i).read_text(errors="replace") for i in range(self.processes))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def newest(run: Run) -> int:
    """The step of the newest checkpoint, -1 without one."""
    folder = run.workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def wait_for(run: Run, started: list[subprocess.Popen], checkpoints: int) -> None:
    """Returns when steps have begun and so many new checkpoints are there, or a process ended."""
    began, end = newest(run), time.monotonic() + PATIENCE
    while all(process.poll() is None for process in started):
        compiled = "compiled the step" in run.log().read_text(errors="replace")
        if compiled and newest(run) - began >= EVERY * checkpoints:
            return
        if time.monotonic() > end:
            raise SystemExit(f"No progress within {PATIENCE} s:\n{run.words()}")
        time.sleep(0.01)


def kill(run: Run, rng: random.Random, number: int, most: int) -> dict | None:
    """Starts or resumes the run and kills it; None if it came to its end first.

    Args:
        run: the run.
        rng: draws the moment and the victims.
        number: of the kill, from 0; every fifth falls into the start.
        most: checkpoints that the run makes before, at most.
    """
    started = run.start()
    moment = "start" if number % 5 == 4 else "training"
    if moment == "training":
        wait_for(run, started, rng.randint(0, most))
    time.sleep(delay := rng.uniform(0, START_SECONDS if moment == "start" else TRAIN_SECONDS))
    if any(process.poll() is not None for process in started):
        return finish(run, started)
    victims = started if rng.random() < 0.5 else [rng.choice(started)]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    folder = run.workdir / "checkpoints"
    in_saving = folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())
    return {
        "kill": number + 1,
        "moment": moment,
        "seconds": round(delay, 3),
        "newest_checkpoint": newest(run),
        "in_saving": in_saving,
        "killed": len(victims),
        "seconds_until_all_had_ended": ended(started),
    }


def ended(started: list[subprocess.Popen]) -> float:
    """Waits until all processes have ended; the seconds that took."""
    began = time.monotonic()
    for process in started:
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise SystemExit(f"A process still ran {PATIENCE} s after another's kill.") from None
    return round(time.monotonic() - began, 2)


def finish(run: Run, started: list[subprocess.Popen]) -> None:
    """Waits for the end of a run that is left alone."""
    for process in started:
        process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"It ended with an error:\n{run.words()}")


def state_of(workdir: Path, step: int) -> dict[str, str]:
    """A hash of every array of a checkpoint, by part and path."""
    found = {}
    for part in ("weights", "optimizer", "interval"):
        path = workdir / "checkpoints" / str(step) / part
        handler = ocp.PyTreeCheckpointer()
        tree = handler.metadata(path).item_metadata.tree
        as_numpy = _map(tree, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
        restored = handler.restore(path, restore_args=as_numpy)
        for name, value in _leaves(restored, part):
            array = np.asarray(value)
            digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            found[name] = digest.hexdigest()
    return found


def _map(tree: object, function: object) -> object:
    if isinstance(tree, dict):
        return {name: _map(child, function) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map(child, function) for child in tree]
    return function(tree) if tree is not None else None


def _leaves(tree: object, prefix: str) -> list[tuple[str, object]]:
    if isinstance(tree, dict):
        return [x for name, child in tree.items() for x in _leaves(child, f"{prefix}/{name}")]
    if isinstance(tree, (list, tuple)):
        return [x for i, child in enumerate(tree) for x in _leaves(child, f"{prefix}/{i}")]
    return [] if tree is None else [(prefix, tree)]


def metrics_of(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in CLOCKED and not k.startswith("perf/")}
        for line in lines
    ]


def first_difference(one: list[dict], other: list[dict]) -> list[dict | None]:
    """The first lines that differ, what they have alike left out; [] if none do."""
    for first, second in itertools.zip_longest(one, other):
        if first != second:
            both = (first or {}).items() & (second or {}).items()
            return [line and dict(line.items() - both) for line in (first, second)]
    return []


def main() -> None:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax misses a file that it does not need
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        alone = Run(home / "alone", home, args.processes, args.steps)
        finish(alone, alone.start())
        disturbed = Run(home / "disturbed", home, args.processes, args.steps)
        rng, kills = random.Random(args.seed), []
        while len(kills) < args.kills:
            one = kill(disturbed, rng, len(kills), args.steps // EVERY // args.kills)
            if one is None:
                raise SystemExit(f"It was done after {len(kills)} kills; give more --steps.")
            kills.append(one)
            print(" ".join(f"{name}={value}" for name, value in one.items()), flush=True)
        finish(disturbed, disturbed.start())
        states = [state_of(run.workdir, args.steps) for run in (alone, disturbed)]
        lines = [metrics_of(run.workdir) for run in (alone, disturbed)]
    names = sorted(states[0].keys() | states[1].keys())
    differing = [name for name in names if states[0].get(name) != states[1].get(name)]
    result = {
        "benchmark": "survival",
        "processes": args.processes,
        "steps": args.steps,
        "kills": len(kills),
        "in_saving": sum(one["in_saving"] for one in kills),
        "of_one_process_alone": sum(one["killed"] < args.processes for one in kills),
        "arrays": len(names),
        "arrays_that_differ": differing,
        "metrics_lines": len(lines[0]),
        "metrics_that_differ": first_difference(*lines),
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))
    sys.exit(bool(differing or result["metrics_that_differ"] or not names))


if __name__ == "__main__":
    main()
