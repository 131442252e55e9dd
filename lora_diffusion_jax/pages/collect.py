"""What a page shows of each run, read from the run's directory."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.training import workdir
from lora_diffusion_jax.training.writers import read_metrics

SEED = "train.seed"
MAX_POINTS = 400  # of a curve
_CURVES = re.compile(r"train/(loss.*|grad_norm|lora_grad_norm|learning_rate)|eval/.*")
ANALYSIS = "analysis"  # a folder in a run: `--mode=analyze --out=RUN/analysis`
COMPARISON = "compare"  # a folder in a sweep: `--mode=compare --out=SWEEP/compare`
_SAMPLES = re.compile(r"[0-9]{10}\.png")
_PARAMETERS = re.compile(r"^(?:trained|frozen) parameters: ([0-9,]+)$", re.MULTILINE)

Value = float | None  # None: not known, or not finite


@dataclasses.dataclass(frozen=True)
class Source:
    """A run that a page is to show.

    Attributes:
        name: the run's.
        directory: where it is.
        changes: its fields that differ between the runs.
        state: one word.
        detail: more about it, such as the last lines of a run that failed.
        command: what makes it, as a shell takes it.
        settings: further fields, listed apart from the table.
    """

    name: str
    directory: Path
    changes: Mapping[str, Any]
    state: str = ""
    detail: str = ""
    command: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is shown of a run.

    Attributes:
        source: which run it is.
        images: seen so far.
        total: of its whole training; 0 if it is not known.
        metrics: the newest value of each, by name: the loss, and results of evaluations.
        parameters: of the network; None before the run has begun.
        gflop: of a training step, per image.
        rate: images per second: the median over the run.
        seconds: of training and callbacks, without compiling.
        curves: (images, value) pairs by metric.
        samples: the newest grid of samples, relative to the run's directory; '' if there is none.
        pictures: of an analysis of the adapters, likewise.
    """

    source: Source
    images: int
    total: int
    metrics: Mapping[str, Value]
    parameters: int | None
    gflop: Value
    rate: Value
    seconds: Value
    curves: Mapping[str, Sequence[tuple[int, float]]]
    samples: str
    pictures: Sequence[str]


def collect(source: Source) -> Run:
    """Reads a run's directory; what is missing or damaged there is left out."""
    lines = read_metrics(source.directory)
    newest = {name: value for line in lines for name, value in line.items()}
    rates = [rate for line in lines if (rate := _number(line.get("perf/images_per_sec")))]
    tflops, rate = (
        _number(newest.get("perf/tflops_per_sec")),
        _number(newest.get("perf/images_per_sec")),
    )
    measured = {name: newest[name] for name in sorted(newest) if name.startswith("eval/")}
    measured = {"train/loss": newest.get("train/loss"), **measured, **_results(source.directory)}
    return Run(
        source=source,
        images=max((_whole(line.get("images")) for line in lines), default=0),
        total=_total(source.directory),
        metrics={name: _number(value) for name, value in measured.items()},
        parameters=_parameters(source.directory),
        gflop=1e3 * tflops / rate if tflops and rate else None,
        rate=statistics.median(rates) if rates else None,
        seconds=_seconds(lines),
        curves=_curves(lines),
        samples=_samples(source.directory),
        pictures=pictures(source.directory, ANALYSIS),
    )


def _number(value: Any) -> Value:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _total(directory: Path) -> int:
    try:
        return _whole(workdir.read_config(directory).get("train", {}).get("total_images"))
    except (UserError, AttributeError):
        return 0


def _results(directory: Path) -> dict[str, Any]:
    """The results of eval_fid.py of the newest step, by metric."""
    found = {}
    records = results.read(results.results_file(directory)).values()
    for record in sorted(records, key=lambda record: record["step"]):
        found[record["metric"]] = record["value"]
    return found


def _parameters(directory: Path) -> int | None:
    path = directory / "parameters.txt"
    if not path.is_file():
        return None
    counts = _PARAMETERS.findall(path.read_text(errors="replace"))
    return sum(int(count.replace(",", "") or 0) for count in counts)


def _seconds(lines: Iterable[Mapping[str, Any]]) -> Value:
    """What the lines account for: their images at their rate, and the callbacks."""
    total, before = 0.0, 0
    for line in lines:
        images, rate = _whole(line.get("images")), _number(line.get("perf/images_per_sec"))
        if rate:
            total += (images - before) / rate
            before = images
        total += _number(line.get("callback/seconds")) or 0.0
    return total or None


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if _CURVES.fullmatch(name) and (number := _number(value)) is not None:
                curves.setdefault(name, []).append((_whole(line.get("images")), number))
    return {name: thinned(points) for name, points in curves.items()}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MAX_POINTS of a curve's points, evenly chosen, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(k * step)] for k in range(MAX_POINTS)]


def _samples(directory: Path) -> str:
    folder = directory / "samples"
    names = [p.name for p in folder.glob("*.png") if _SAMPLES.fullmatch(p.name)]
    return f"samples/{max(names)}" if names else ""


def pictures(directory: Path, folder: str) -> list[str]:
    """The PNG files in a folder of a run or a sweep, relative to its directory."""
    return sorted(f"{folder}/{path.name}" for path in (directory / folder).glob("*.png"))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Runs that differ in their seed alone: by metric, how many have it, mean and sample deviation."""

    changes: Mapping[str, Any]
    names: Sequence[str]
    metrics: Mapping[str, tuple[int, float, float]]


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """The groups of two or more finished runs that are equal but for the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.source.state == "done":
            rest = {k: v for k, v in run.source.changes.items() if k != SEED}
            groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    found = []
    for members in groups.values():
        if len(members) < 2:
            continue
        metrics = {}
        for name in metric_names(members):
            values = [v for run in members if (v := run.metrics.get(name)) is not None]
            if len(values) > 1:
                metrics[name] = (len(values), statistics.mean(values), statistics.stdev(values))
        changes = {k: v for k, v in members[0].source.changes.items() if k != SEED}
        found.append(Spread(changes, [run.source.name for run in members], metrics))
    return found


def metric_names(runs: Iterable[Run]) -> list[str]:
    """The metrics that any of the runs has, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def changed_fields(runs: Iterable[Run]) -> list[str]:
    """The fields that any of the runs changes, in the order in which they appear."""
    return list(dict.fromkeys(field for run in runs for field in run.source.changes))
