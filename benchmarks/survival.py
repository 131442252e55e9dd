"""Kills a training run again and again, resumes it each time, and compares its result with that of an
undisturbed run: every bit of parameters, moments, EMA and counters, and metrics.jsonl.

python -m benchmarks.survival [--kills=20] [--processes=1|2] [--steps=200] [--seed=0]
    [--config=digits_iddpm --config.model.channels=32 ...]

The run is `main.py --mode=train` of a config for the digits, made small; further flags are main.py's. It
saves a checkpoint every 3 steps, so that most kills hit a save. A kill is a kill -9 at a random moment of
the start or of training; with several processes it hits all of them or one, and the others then have to
exit by themselves. Prints one line per kill and one JSON line at the end; the exit status is 1 if the
results differ.
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

import jax
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
# A kill comes at most so many seconds after the start, or after some checkpoint of training.
START_SECONDS, TRAIN_SECONDS = 5.0, 0.5
PATIENCE = 900.0  # seconds until a process that should make progress or exit is given up
# Fields of metrics.jsonl that differ in any two runs: the clock, and the checksum of a line with it.
CLOCKED = ("time", "callback/seconds", "crc32")


@dataclasses.dataclass
class Run:
    """One training run, started as often as needed."""

    workdir: Path
    home: Path  # of the data set and the compiled programs
    processes: int
    steps: int
    flags: list[str]  # of main.py, which replace those of CONFIG

    def start(self) -> list[subprocess.Popen]:
        """Starts all processes of the run; their output goes to log-I beside the workdir."""
        fields = {**CONFIG, "train.total_images": self.steps * BATCH, "data.data_dir": self.home}
        command = [sys.executable, "main.py", "--mode=train", f"--workdir={self.workdir}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += self.flags  # a field given twice takes the last value
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.home / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if self.processes > 1:
            with socket.socket() as listener:  # a port that nobody listens on
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            command += [f"--coordinator_address=127.0.0.1:{port}"]
            command += [f"--num_processes={self.processes}"]
        started = []
        for index in range(self.processes):
            own = [f"--process_id={index}"] if self.processes > 1 else []
            with self.log(index).open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [*command, *own], cwd=ROOT, env=environment, stdout=log, stderr=log
                    )
                )
        return started

    def log(self, index: int = 0) -> Path:
        """The file with a process's output."""
        return self.workdir.with_name(f"{self.workdir.name}-log-{index}")

    def output(self) -> str:
        """What all processes have printed since the last start."""
        return "\n".join(self.log(i).read_text(errors="replace") for i in range(self.processes))

    def checkpoints(self) -> list[str]:
        """The names in the folder of checkpoints."""
        folder = self.workdir / "checkpoints"
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def newest(self) -> int:
        """The step of the newest checkpoint, -1 without one."""
        return max((int(name) for name in self.checkpoints() if name.isdecimal()), default=-1)


def wait_for(run: Run, started: list[subprocess.Popen], checkpoints: int) -> None:
    """Returns when steps have begun and so many new checkpoints exist, or a process has exited."""
    began, deadline = run.newest(), time.monotonic() + PATIENCE
    while all(process.poll() is None for process in started):
        compiled = "compiled the step" in run.log().read_text(errors="replace")
        if compiled and run.newest() - began >= EVERY * checkpoints:
            return
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
            raise SystemExit(f"No progress within {PATIENCE} s:\n{run.output()}")
        time.sleep(0.01)


def kill(run: Run, rng: random.Random, number: int, checkpoints: int) -> dict | None:
    """Starts or resumes the run and kills it; None if it finished first.

    Args:
        run: the run.
        rng: draws the moment and the victims.
        number: of the kill, from 0; every fifth hits the start.
        checkpoints: the most that the run saves before.
    """
    started = run.start()
    moment, seconds = ("start", START_SECONDS) if number % 5 == 4 else ("training", TRAIN_SECONDS)
    if moment == "training":
        wait_for(run, started, rng.randint(0, checkpoints))
    time.sleep(delay := rng.uniform(0, seconds))
    if any(process.poll() is not None for process in started):
        return finish(run, started)
    victims = started if rng.random() < 0.5 else [rng.choice(started)]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    return {
        "kill": number + 1,
        "moment": moment,
        "seconds": round(delay, 3),
        "newest_checkpoint": run.newest(),
        "in_saving": any("tmp" in name for name in run.checkpoints()),
        "killed": len(victims),
        "seconds_until_all_exited": wait_for_exit(started),
    }


def wait_for_exit(started: list[subprocess.Popen]) -> float:
    """Waits until all processes have exited; the seconds that took."""
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
    """Waits for the end of a run that is not disturbed."""
    for process in started:
        process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"The run failed:\n{run.output()}")


def state_of(workdir: Path, step: int) -> dict[str, str]:
    """A hash of every array of a checkpoint, by part and path."""
    found = {}
    with ocp.PyTreeCheckpointer() as reader:
        for part in ("weights", "optimizer", "interval"):
            path = workdir / "checkpoints" / str(step) / part
            saved = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            restored = reader.restore(path, restore_args=as_numpy)
            for name, array in jax.tree_util.tree_leaves_with_path(restored):
                digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())
                found[f"{part}{jax.tree_util.keystr(name)}"] = digest.hexdigest()
    return found


def metrics_of(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in CLOCKED and not k.startswith("perf/")}
        for line in lines
    ]


def main() -> None:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="digits")
    args, flags = parser.parse_known_args()
    flags.append(f"--config={args.config}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax misses a file that it does not need
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        alone = Run(home / "alone", home, args.processes, args.steps, flags)
        finish(alone, alone.start())
        disturbed = Run(home / "disturbed", home, args.processes, args.steps, flags)
        rng, kills = random.Random(args.seed), []
        while len(kills) < args.kills:
            one = kill(disturbed, rng, len(kills), args.steps // EVERY // args.kills)
            if one is None:
                raise SystemExit(f"It finished after {len(kills)} kills; give more --steps.")
            kills.append(one)
            print(" ".join(f"{name}={value}" for name, value in one.items()), flush=True)
        finish(disturbed, disturbed.start())
        states = [state_of(run.workdir, args.steps) for run in (alone, disturbed)]
        lines = [metrics_of(run.workdir) for run in (alone, disturbed)]
    arrays = sorted(dict(states[0].items() ^ states[1].items()))
    different = [pair for pair in itertools.zip_longest(*lines) if pair[0] != pair[1]]
    result = {
        "benchmark": "survival",
        "config": args.config,
        "processes": args.processes,
        "steps": args.steps,
        "kills": len(kills),
        "in_saving": sum(one["in_saving"] for one in kills),
        "of_one_process_alone": sum(one["killed"] < args.processes for one in kills),
        "arrays": len(states[0]),
        "arrays_that_differ": arrays,
        "metrics_lines": len(lines[0]),
        "metrics_that_differ": different[:1],
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result))
    sys.exit(bool(arrays or different or not states[0]))


if __name__ == "__main__":
    main()
