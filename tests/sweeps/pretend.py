"""A program that behaves like a training run, in milliseconds: python pretend.py FOLDER STEPS WHAT.

It holds the run's lock, writes a line of metrics and a checkpoint a step, resumes, and saves when asked
to stop. WHAT: `ends`, `fails` after its first step, or `waits` before the last until FOLDER/go exists.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from lora_diffusion_jax import files

CONFIG = {
    "train": {"batch_size": 10, "total_images": 30},
    "eval": {"num_samples": 0, "reference": ""},
    "data": {"name": "digits", "eval_path": ""},
}


def main():
    folder, steps, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    print(f"parent {os.getppid()}", flush=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    with files.Lock(folder / ".lock", "taken by {holder}", f"process {os.getpid()}"):
        first = len(list(checkpoints.iterdir())) + 1
        for step in range(first, steps + 1):
            while what == "waits" and step == steps and not (stopped or (folder / "go").exists()):
                time.sleep(0.02)
            if stopped:
                print("saved and stopped")
                sys.exit(128 + signal.SIGTERM)
            line = {"step": step, "images": 10 * step, "train/loss": 1 / step}
            files.append(folder / "metrics.jsonl", files.checked_line(json.dumps(line)))
            (checkpoints / str(step)).mkdir()
            if what == "fails":
                print("a first line")
                print("error: the loss has a mind of its own", file=sys.stderr)
                sys.exit(2)
        line = {"step": steps, "images": 10 * steps, "callback": "samples"}
        files.append(folder / "metrics.jsonl", files.checked_line(json.dumps(line)))


if __name__ == "__main__":
    main()
