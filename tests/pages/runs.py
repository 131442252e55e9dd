"""Directories that look like runs, for pages to show."""

import json

import numpy as np

from lora_diffusion_jax import files, outputs
from lora_diffusion_jax.pages.collect import Source


def make_run(root, name, changes, *, loss=1.0, fd=None, state="done", more=None, detail=""):
    """A run of 3 lines of metrics, a grid of samples, and perhaps an evaluation; as a Source."""
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    config = {"train": {"batch_size": 10, "total_images": 300}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "parameters.txt").write_text(
        "trained parameters: 1,200\n...\nfrozen parameters: 34\n"
    )
    for step in (10, 20, 30):
        line = {"step": step, "images": 10 * step, "train/loss": loss * 40 / step}
        line |= {"perf/images_per_sec": 10.0 * step, "perf/tflops_per_sec": 0.2}
        files.append(
            folder / "metrics.jsonl", files.checked_line(json.dumps({**line, **(more or {})}))
        )
    values = {} if fd is None else {"eval/fd_100": fd}
    line = {"step": 30, "images": 300, "callback": "eval", "callback/seconds": 3.0, **values}
    files.append(folder / "metrics.jsonl", files.checked_line(json.dumps(line)))
    outputs.write_png(folder / "samples" / "0000000200.png", np.zeros([8, 8, 1], np.uint8))
    outputs.write_png(folder / "samples" / "0000000300.png", np.full([8, 8, 1], 255, np.uint8))
    return Source(name, folder, changes, state, detail, f"main.py --workdir={folder}")
