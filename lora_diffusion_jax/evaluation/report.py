"""What is reported: metrics by name, and the labels that say what each number is."""

import functools
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.collect import FeatureSet
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.metrics import (
    count_name,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from lora_diffusion_jax.evaluation.neighbours import manifold_metrics, memorisation
from lora_diffusion_jax.evaluation.statistics import Reference

Record = dict[str, Any]  # one JSON line
INCEPTION = "inception_"


def metric_name(kind: str, detector: Detector, count: int) -> str:
    """Names a number: 'fid_50k' in Inception features, 'fd_classifier_1k' in others.

    `kind` is fid, kid, is or a metric of neighbours; FID and KID are names of distances in
    Inception features alone. With weights that are not the published ones: 'fid_50k_unverified'.
    """
    if detector.name.startswith(INCEPTION):
        doubt = "" if detector.details["verified"] else "_unverified"
        return f"{kind}_{count_name(count)}{doubt}"
    kind = {"fid": "fd", "kid": "kd"}.get(kind, kind)
    return f"{kind}_{detector.name}_{count_name(count)}"


def _fid(fake: FeatureSet, reference: Reference) -> list[tuple[str, float, Record]]:
    value = frechet_distance(
        *fake.moments.result(), reference.mu, reference.sigma, root2=reference.root
    )
    return [("fid", value, {})]


def _kid(fake: FeatureSet, reference: Reference) -> list[tuple[str, float, Record]]:
    real = _rows(reference)
    value, deviation = kernel_distance(fake.features, real)
    return [("kid", value, {"std": deviation, "subsets": 100, "subset_size": 1000})]


def _is(fake: FeatureSet, reference: Reference) -> list[tuple[str, float, Record]]:
    value, deviation = inception_score(fake.logits)
    return [("is", value, {"std": deviation, "splits": 10})]


def _pr(fake: FeatureSet, reference: Reference) -> list[tuple[str, float, Record]]:
    values = manifold_metrics(_rows(reference), fake.features)
    neighbours = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
    return [(name, value, {"neighbours": neighbours[name]}) for name, value in values.items()]


def _memorisation(fake: FeatureSet, reference: Reference) -> list[tuple[str, float, Record]]:
    found = memorisation(fake.features, _rows(reference))
    return [("memorised", found.pop("memorised"), found)]


Compute = Callable[[FeatureSet, Reference], list[tuple[str, float, Record]]]
# What --metrics may name: the function, and the kinds of numbers that it gives.
METRICS: dict[str, tuple[Compute, tuple[str, ...]]] = {
    "fid": (_fid, ("fid",)),
    "kid": (_kid, ("kid",)),
    "is": (_is, ("is",)),
    "pr": (_pr, ("precision", "recall", "density", "coverage")),
    "memorisation": (_memorisation, ("memorised",)),
}


def parse_metrics(text: str) -> list[str]:
    """'fid,kid' -> ['fid', 'kid']; an unknown or repeated name is a UserError."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in METRICS]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--metrics={text}; choose some of {','.join(METRICS)}, each once.")
    return names


def metric_names(metrics: Sequence[str], detector: Detector, count: int) -> list[str]:
    """The names of all numbers that some metrics give."""
    kinds = [kind for metric in metrics for kind in METRICS[metric][1]]
    return [metric_name(kind, detector, count) for kind in kinds]


def seeds_text(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)


def check_reference(reference: Reference, detector: Detector, metrics: Sequence[str]) -> None:
    """Raises UserError, before anything is computed, if the reference cannot serve."""
    made_with = reference.meta.get("features")
    if len(reference.mu) != detector.feature_dim:
        raise UserError(
            f"The reference has {len(reference.mu)} features and the {detector.name} detector "
            f"{detector.feature_dim}. Use a reference made with --features of the same name"
            + (f" (this one: {made_with})." if made_with else ".")
        )
    if made_with and made_with != detector.name:
        raise UserError(
            f"The reference was made with {made_with} features, not with {detector.name}. Leave "
            "--features out, or make a reference with it."
        )
    if "is" in metrics and not detector.has_classes:
        raise UserError(
            f"The Inception Score needs classes, which the {detector.name} features do not have. "
            "Leave `is` out of --metrics."
        )
    hashed = reference.meta.get("detector_hash")
    if hashed and hashed != detector.hash:
        raise UserError(
            f"The reference was made with other weights: detector hash {hashed} there, "
            f"{detector.hash} here. Use the same weights file for both."
        )


# Fewest images that a metric makes sense of.
FEWEST = {"fid": 2, "kid": 1000, "is": 10, "pr": 6, "memorisation": 1}
FEWEST_REAL = {"kid": 1000, "pr": 6, "memorisation": 3}


def check_counts(metrics: Sequence[str], count: int, reference: Reference) -> None:
    """Raises UserError, before anything is computed, if a metric needs more images on either side.

    Args:
      metrics: their names.
      count: images to be judged.
      reference: what they are compared with.
    """
    for metric in metrics:
        real = len(_rows(reference)) if metric in FEWEST_REAL else 0
        for have, need, whose in (
            (count, FEWEST[metric], "to judge"),
            (real, FEWEST_REAL.get(metric, 0), "in the reference"),
        ):
            if have < need:
                raise UserError(
                    f"The metric `{metric}` needs at least {need} images; there are {have} {whose}. "
                    "Give more, or leave it out of --metrics."
                )


def _rows(reference: Reference) -> np.ndarray:
    if reference.features is None:
        raise UserError(
            "The reference holds mean and covariance alone; kid, pr and memorisation compare with "
            "single images. Make it anew with: eval_fid.py ref ... --keep_features"
        )
    return reference.features


def records(
    metrics: Sequence[str],
    fake: FeatureSet,
    reference: Reference,
    detector: Detector,
    labels: Record,
) -> Iterable[Record]:
    """Yields one labelled record per number, as soon as it is known."""
    for metric in metrics:
        for kind, value, extra in METRICS[metric][0](fake, reference):
            yield {
                "metric": metric_name(kind, detector, len(fake)),
                "value": value,
                **extra,
                "n": len(fake),
                **describe(detector, reference),
                **labels,
                "code_version": code_version(),
            }


def describe(detector: Detector, reference: Reference | None = None) -> Record:
    """The labels of features and reference."""
    about: Record = {"features": detector.name, "detector_hash": detector.hash}
    if detector.name.startswith(INCEPTION):
        about["detector_verified"] = bool(detector.details["verified"])
    if reference is not None:
        about["reference_hash"] = reference.hash
        about["n_reference"] = reference.meta.get("n")
    return about


HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage")


def is_score(metric: str) -> bool:
    """Whether more is better in a metric named as `metric_name` names them."""
    return metric.split("_")[0] in HIGHER_IS_BETTER


def repeated(rows: Sequence[Record]) -> Record:
    """Summarises one metric over repeats with other seeds: the value is the best, as in papers.

    That is the minimum of a distance, the maximum of a score. 'std' is the sample deviation (n - 1)
    over the repeats.
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


def to_line(record: Record) -> str:
    """One line of strict JSON; infinity becomes a word."""
    return json.dumps(_plain(record))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def say(text: str) -> None:
    """Prints to stderr what is not a result."""
    print(text, file=sys.stderr, flush=True)


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
    """The commit where there is one, and the hash of the source: 'a1b2c3d src-0123456789'."""
    source = f"src-{source_hash()}"
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return source
    return f"{answer.stdout.strip()} {source}".strip()
