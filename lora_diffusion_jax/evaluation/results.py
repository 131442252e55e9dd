"""Results as JSON lines: their labels, the file that a run keeps them in, and notes beside them."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax import files, remote

Record = dict[str, Any]  # one JSON line
FOLDER = "evaluation"  # inside a workdir
FILE = "results.jsonl"
MAX_LINE = 1 << 20  # bytes of a result
HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "accuracy")
# What makes two results the same measurement; the code version is not part of it.
KEY = (
    *("metric", "step", "weights", "seeds", "sampler", "lora", "dtype"),
    *("detector_hash", "reference_hash", "repeats"),
)


def note(text: str) -> None:
    """Prints to stderr what is not a result."""
    print(remote.named(text), file=sys.stderr, flush=True)


def to_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, which has no infinity: it becomes the word 'inf'."""
    text = json.dumps(record, default=np.generic.item)
    return json.dumps(json.loads(text, parse_constant=lambda word: str(float(word))))


def seeds_text(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)


def is_score(metric: str) -> bool:
    """Whether higher is better in a metric named like 'recall_50k'."""
    return metric.split("_")[0] in HIGHER_IS_BETTER


def summary(rows: Sequence[Record]) -> Record:
    """Summarises one metric over repeats with different seeds: the value is the best, as in papers.

    That is the minimum of a distance and the maximum of a score. 'std' is the sample deviation
    (n - 1) over the repeats.
    """
    values = [row["value"] for row in rows]
    first = {k: v for k, v in rows[0].items() if k not in ("std", "seeds")}
    return {
        **first,
        "value": max(values) if is_score(first["metric"]) else min(values),
        "repeats": len(rows),
        "min": min(values),
        "max": max(values),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)),
        "values": values,
        "seeds": [row["seeds"] for row in rows],
    }


# The file of a run.


def results_file(workdir: str | os.PathLike[str]) -> Path:
    """Where a run's results are appended."""
    return Path(workdir) / FOLDER / FILE


def append(path: Path, record: Record) -> None:
    """Appends one result, with its CRC-32; a partial line left by a crash stays a line of its own."""
    with files.disk_errors(path):
        files.make_folder(path.parent, path.parent.parent)
        files.append(path, files.checked_line(to_line(record)), sync=True)
        remote.push_lines(path)


def read(path: Path) -> dict[str, Record]:
    """Returns the results in a file by key; damaged lines are left out, and moved away by `repair`."""
    return {key_of(record): record for record in files.read_lines(path)[0] if _is_result(record)}


def repair(path: Path) -> None:
    """Moves damaged lines of a results file (bits changed, cut off by a crash) to FILE.damaged."""
    good, damaged = files.read_lines(path)
    if not damaged:
        return
    with files.disk_errors(path):
        aside = path.with_name(f"{path.name}.damaged")
        files.append(aside, b"".join(line + b"\n" for line in damaged))
        with files.atomic(path) as temporary:
            temporary.write_bytes(b"".join(files.checked_line(to_line(record)) for record in good))
    remote.push(aside)
    remote.push(path)
    note(f"{path}: moved {len(damaged)} damaged lines to {aside.name}; they are measured again")


def _is_result(record: Any) -> bool:
    """Whether a line of the file holds a result of a checkpoint; infinity stands there as a word."""
    if not isinstance(record, dict):
        return False
    value = record.get("value")
    number = type(value) in (int, float) or value in ("inf", "-inf", "nan")
    return number and type(record.get("metric")) is str and type(record.get("step")) is int


def key_of(record: Record) -> str:
    """What a record measures, as text that two records of the same measurement share."""
    return to_line({name: record.get(name) for name in KEY})


# The code.


@functools.cache
def source_hash() -> str:
    """First 10 hex digits of a hash of the package's source."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


@functools.cache
def code_version() -> str:
    """The commit, if there is one, and the hash of the source: 'a1b2c3d src-0123456789'."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        commit = answer.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{commit} src-{source_hash()}".strip()
