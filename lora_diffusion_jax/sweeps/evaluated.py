"""The results of eval_fid.py of all runs of a sweep, measured alike."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.training import checkpoint

# What makes a measurement comparable; the network's own settings differ between kinds.
_SETTINGS = ("weights", "sampler", "dtype", "detector_hash", "reference_hash")

_ADVICE = "Evaluate all runs alike, each once: eval_fid.py all --workdir=SWEEP ..."


class Measure(NamedTuple):
    """One metric of all runs.

    Attributes:
        values: directory of a run -> mean over the sampling seeds.
        settings: how it was measured, with the ranges of sampling seeds.
    """

    values: Mapping[Path, float]
    settings: Mapping[str, Any]


def read_measures(runs: Sequence[Path]) -> tuple[dict[str, Measure], list[str]]:
    """The metrics that every run has, of the newest checkpoint and EMA weights; notes on what is left out.

    Raises:
        UserError: a metric was measured with different settings or sampling seeds, or is not finite.
    """
    found = {run: _results(run) for run in runs}
    measures, notes = {}, []
    for name in sorted({name for by_metric in found.values() for name in by_metric}):
        having = [run for run in runs if name in found[run]]
        if len(having) < len(runs):
            notes.append(
                f"{name} is left out: {len(runs) - len(having)} of {len(runs)} runs lack it"
            )
            continue
        shared = set.intersection(*({*found[run][name]} for run in runs))
        if len(shared) != 1:
            raise _unequal(name, runs, found)
        key = shared.pop()
        by_run = {run: found[run][name][key] for run in runs}
        seeds = by_run[runs[0]].keys()
        if other := next((run for run in runs if by_run[run].keys() != seeds), None):
            raise UserError(
                f"{name} of {other} is of the sampling seeds {_listed(by_run[other])}, that of {runs[0]} of "
                f"{_listed(seeds)}. {_ADVICE}"
            )
        values = {run: _mean(name, run, by_run[run].values()) for run in runs}
        measures[name] = Measure(values, {**json.loads(key), "seeds": sorted(seeds)})
    return measures, notes


def _results(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Results of a run's newest checkpoint: metric -> settings as JSON -> sampling seeds -> value."""
    step = max(checkpoint.saved_steps(run), default=-1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in results.read(results.results_file(run)).values():
        seeds = record.get("seeds")
        if record.get("weights") == "ema" and record["step"] == step and type(seeds) is str:
            settings = json.dumps({name: record.get(name) for name in _SETTINGS}, sort_keys=True)
            by_settings = found.setdefault(record["metric"], {})
            by_settings.setdefault(settings, {})[seeds] = float(record["value"])
    return found


def _unequal(name: str, runs: Sequence[Path], found: Mapping[Path, Any]) -> UserError:
    """The error of a metric for which no settings, or several, are those of all runs."""
    ways = [(run, json.loads(key)) for run in runs for key in found[run][name]]
    first, ours = ways[0]
    other, field = next(
        (run, field) for run, theirs in ways for field in _SETTINGS if theirs[field] != ours[field]
    )
    theirs = next(way for run, way in ways if run == other and way[field] != ours[field])
    return UserError(
        f"{name} was measured with different settings: {field} is {ours[field]} in {first}, {theirs[field]} "
        f"in {other}. {_ADVICE}"
    )


def _mean(name: str, run: Path, values: Any) -> float:
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        raise UserError(f"{name} of {run} is {mean}; a comparison needs finite values.")
    return mean


def _listed(seeds: Any) -> str:
    return ", ".join(sorted(seeds))
