"""Metric, reference and detector, validated together before any work starts."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.collect import FeatureSet, collect
from lora_diffusion_jax.evaluation.detectors import File, detector_for_reference
from lora_diffusion_jax.evaluation.features import Detector, check_cache
from lora_diffusion_jax.evaluation.images import first_images, noise_batches, source_batches
from lora_diffusion_jax.evaluation.metrics import (
    count_name,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from lora_diffusion_jax.evaluation.neighbours import manifold_metrics, memorisation
from lora_diffusion_jax.evaluation.references import Reference, load_reference
from lora_diffusion_jax.evaluation.results import Record, code_version, note
from lora_diffusion_jax.processes import alone, from_leader, is_leader

METRICS_LIMIT = 3600.0  # seconds that other processes wait for process 0's arithmetic

Values = list[tuple[str, float, Record]]  # (kind, value, further labels)


class Metric(NamedTuple):
    """What one name in --metrics stands for."""

    compute: Callable[[FeatureSet, Reference], Values]
    kinds: tuple[str, ...]  # of the numbers it gives
    min_images: int
    min_real: int = 0  # images whose features the reference must hold


def _rows(images: FeatureSet | Reference) -> np.ndarray:
    assert images.features is not None  # `check` has seen to that
    return images.features


def _fid(fake: FeatureSet, real: Reference) -> Values:
    value = frechet_distance(*fake.moments.result(), real.mu, real.sigma, root2=real.root)
    return [("fid", value, {})]


def _kid(fake: FeatureSet, real: Reference) -> Values:
    value, deviation = kernel_distance(_rows(fake), _rows(real))
    return [("kid", value, {"std": deviation, "subsets": 100, "subset_size": 1000})]


def _is(fake: FeatureSet, real: Reference) -> Values:
    assert fake.logits is not None
    value, deviation = inception_score(fake.logits)
    return [("is", value, {"std": deviation, "splits": 10})]


def _pr(fake: FeatureSet, real: Reference) -> Values:
    neighbours = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
    values = manifold_metrics(_rows(real), _rows(fake))
    return [(name, value, {"neighbours": neighbours[name]}) for name, value in values.items()]


def _memorisation(fake: FeatureSet, real: Reference) -> Values:
    found = memorisation(_rows(fake), _rows(real))
    return [("memorised", found.pop("memorised"), found)]


def _accuracy(fake: FeatureSet, real: Reference) -> Values:
    assert fake.logits is not None
    assert fake.classes is not None  # `check_classes` has seen to that
    right = fake.logits.argmax(axis=-1) == fake.classes
    standard_error = float(right.std(ddof=1) / np.sqrt(len(right)))
    return [("accuracy", float(right.mean()), {"standard_error": standard_error})]


METRICS = {
    "fid": Metric(_fid, ("fid",), 2),
    "kid": Metric(_kid, ("kid",), 1000, 1000),
    "is": Metric(_is, ("is",), 10),
    "pr": Metric(_pr, ("precision", "recall", "density", "coverage"), 6, 6),
    "memorisation": Metric(_memorisation, ("memorised",), 1, 3),
    "accuracy": Metric(_accuracy, ("accuracy",), 2),
}


def metric_name(kind: str, detector: Detector, count: int) -> str:
    """Names a number: 'fid_50k' in Inception features, 'fd_classifier_1k' in others.

    `kind` is one of a Metric's kinds; FID and KID are names of distances in Inception features
    alone. With weights other than the published ones: 'fid_50k_unverified'.
    """
    if detector.is_inception:
        doubt = "" if detector.details["verified"] else "_unverified"
        return f"{kind}_{count_name(count)}{doubt}"
    kind = {"fid": "fd", "kid": "kd"}.get(kind, kind)
    return f"{kind}_{detector.name}_{count_name(count)}"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Measures sets of images against a reference.

    Attributes:
        metrics: keys of METRICS.
        reference: what images are compared with.
        detector: the feature space.
        path: the reference's file, for results and errors.
    """

    metrics: Sequence[str]
    reference: Reference
    detector: Detector
    path: str = ""

    def __post_init__(self) -> None:
        """Raises UserError unless the reference was made with the detector and suits the metrics."""
        meta, name, hashed = self.reference.meta, self.detector.name, self.detector.hash
        theirs = (meta.get("features", name), meta.get("detector_hash", hashed))
        sizes = len(self.reference.mu), self.detector.feature_dim
        if theirs != (name, hashed) or sizes[0] != sizes[1]:
            raise UserError(
                f"The reference was made with {sizes[0]} {printable(theirs[0])} features (detector hash "
                f"{printable(theirs[1])}), not with these {sizes[1]} {name} features ({hashed}). Use the "
                "same --features and weights file for both."
            )
        if "is" in self.metrics and not self.detector.has_classes:
            raise UserError(
                f"The Inception Score needs classes, which the {name} features do not have. "
                "Omit `is` from --metrics."
            )

    @property
    def needs_rows(self) -> bool:
        """Whether some metric needs the features of every image, not the moments alone."""
        return set(self.metrics) != {"fid"}

    def names(self, count: int) -> list[str]:
        """The names of all numbers that `count` images give."""
        kinds = [kind for metric in self.metrics for kind in METRICS[metric].kinds]
        return [metric_name(kind, self.detector, count) for kind in kinds]

    def check(self, count: int, shape: Sequence[int] | None, where: str) -> None:
        """Raises UserError unless images can be evaluated, before anything is computed.

        Args:
            count: how many there are.
            shape: (height, width, channels); None: not known yet.
            where: their name, for errors.
        """
        expected = self.reference.meta.get("image_shape") or self.detector.image_shape
        if shape is not None and expected is not None and tuple(expected) != tuple(shape):
            raise UserError(
                f"{where} has images of {tuple(shape)} (height, width, channels); the reference "
                f"{self.path} has {tuple(expected)}. Choose a reference of the same data set."
            )
        real = 0 if self.reference.features is None else len(self.reference.features)
        for name, metric in ((name, METRICS[name]) for name in self.metrics):
            if count < metric.min_images:
                raise UserError(
                    f"The metric `{name}` needs at least {metric.min_images} images; {where} has "
                    f"{count}. Provide more, or omit it from --metrics."
                )
            if real < metric.min_real:
                raise UserError(
                    f"The metric `{name}` needs the features of at least {metric.min_real} images "
                    f"in the reference; {self.path} has {real}. Recreate it with: eval_fid.py ref "
                    "... --keep_features"
                )

    def check_classes(self, num_classes: int, where: str) -> None:
        """Raises UserError unless images of these classes can be evaluated; 0: they have none."""
        known = self.detector.details.get("classes")
        if "accuracy" not in self.metrics or (num_classes and num_classes == known):
            return
        if not num_classes:
            raise UserError(
                f"The metric `accuracy` compares with the class that was asked for, and {where} has none. "
                "Omit it from --metrics."
            )
        raise UserError(
            f"The metric `accuracy` needs a classifier of the {num_classes} classes of {where}; the "
            f"{self.detector.name} features of {self.path} come with "
            f"{'none' if known is None else f'one of {known}'}. Make the reference of the same data with "
            "--features=classifier, or omit `accuracy` from --metrics."
        )

    def records(self, found: FeatureSet, labels: Record) -> Iterable[Record]:
        """One labelled record per number, as soon as it is known; computed by process 0 alone."""
        return compute_on_leader(self._records(found, labels))

    def _records(self, found: FeatureSet, labels: Record) -> Iterator[Record]:
        for metric in self.metrics:
            for kind, value, extra in METRICS[metric].compute(found, self.reference):
                yield {
                    "metric": metric_name(kind, self.detector, len(found)),
                    "value": value,
                    **extra,
                    "n": len(found),
                    **self.detector.labels,
                    "reference_hash": self.reference.hash,
                    "n_reference": self.reference.meta.get("n"),
                    **labels,
                    "reference": self.path,
                    "code_version": code_version(),
                }

    def distance(self, batches: Iterable[np.ndarray]) -> float:
        """The Frechet distance of uint8 batches [n, H, W, C] to the reference, in every process."""
        found = collect(self.detector, batches)
        return _fid(found, self.reference)[0][1]


def compute_on_leader(records: Iterable[Record]) -> Iterable[Record]:
    """Gives the records that process 0 computes; the others wait, perhaps for minutes."""
    if alone():
        return records
    computed: list[Record] = []
    compute = functools.partial(computed.extend, records)
    from_leader("computing the metrics", compute, METRICS_LIMIT)
    return computed


def open_evaluator(
    metrics: str,
    reference: str | os.PathLike[str],
    features: str = "auto",
    inception: File = None,
    dinov2: File = None,
) -> Evaluator:
    """Reads reference and detector, and validates them with the metrics.

    Args:
        metrics: comma-separated names of METRICS, such as 'fid,kid'.
        reference: npz file.
        features: one of detectors.FEATURES.
        inception: Inception weights file, if needed and not in its usual place.
        dinov2: DINOv2 weights file, likewise.

    Raises:
        UserError: one of them cannot be read, or they do not fit together.
    """
    names = [name.strip() for name in metrics.split(",")]
    if not set(names) <= set(METRICS) or len(set(names)) < len(names):
        raise UserError(f"--metrics={metrics}; choose from {','.join(METRICS)}, each once.")
    statistics = load_reference(reference)
    detector = detector_for_reference(statistics, features, inception, dinov2)
    return Evaluator(names, statistics, detector, str(reference))


def for_training(
    source: Source,
    heldout: Source | None,
    *,
    reference: str,
    inception: str,
    counts: Sequence[int] = (),
) -> Callable[[Iterable[np.ndarray], int], dict[str, float]] | None:
    """Returns the evaluation of a training run: (uint8 batches, count) -> distances by name.

    Every process must call it alike; it takes the first `count` images. With a reference it gives
    'fid_2k' or the like, in the reference's features. Else it compares with held-out images, in
    features of a classifier trained on the training images: 'fd_classifier_1k', beside '..._floor'
    (the distance of `count` training images, or all if fewer) and '..._ceiling' (of noise).

    Args:
        source: the training images.
        heldout: real images that training does not see; None: there are none.
        reference: npz file of a reference, or ''.
        inception: Inception weights file, or '' for its usual places.
        counts: the numbers of images that it will be called with.

    Returns:
        The function; None if there is nothing to compare with.

    Raises:
        UserError: the reference or the held-out images cannot be used, or the cache of the feature
            network not be written: now, rather than after hours.
    """
    if reference:
        fixed = open_evaluator("fid", reference, inception=inception or None)
        for count in counts:
            fixed.check(count, source.image_shape, "this run")
        return lambda samples, count: {
            fixed.names(count)[0]: fixed.distance(first_images(samples, count))
        }
    if heldout is None:
        if is_leader():
            note("no evaluation: set data.eval_path (held-out images) or eval.reference")
        return None
    _check_heldout(source, heldout, counts)

    @functools.cache
    def evaluator() -> Evaluator:  # at the first evaluation: training the classifier takes a while
        detector = classifier.fit(source)
        real = collect(detector, source_batches(heldout)).moments
        return Evaluator(["fid"], Reference(*real.result()), detector)

    @functools.cache
    def bounds(count: int) -> dict[str, float]:
        noise = noise_batches(heldout.image_shape, count)
        floor = evaluator().distance(source_batches(source, count))
        return {"_floor": floor, "_ceiling": evaluator().distance(noise)}

    def against_heldout(samples: Iterable[np.ndarray], count: int) -> dict[str, float]:
        name = evaluator().names(count)[0]
        value = evaluator().distance(first_images(samples, count))
        return {name: value} | {name + end: bound for end, bound in bounds(count).items()}

    return against_heldout


def _check_heldout(source: Source, heldout: Source, counts: Sequence[int]) -> None:
    """Raises UserError unless held-out images can be compared with samples; reads all of them."""
    if heldout.image_shape != source.image_shape:
        raise UserError(
            f"The held-out images are {heldout.image_shape} (height, width, channels), the training images "
            f"{source.image_shape}. Choose others (data.eval_split, data.eval_path), or eval.num_samples=0."
        )
    fewest = min(len(heldout), *counts) if counts else len(heldout)
    if fewest < 2:
        raise UserError(
            f"A distance needs at least 2 images, but there are {len(heldout)} held out and the samples are "
            f"{', '.join(map(str, counts))}. Provide more, or set eval.num_samples=0."
        )
    for _ in source_batches(heldout):  # a damaged image is an error now
        pass
    check_cache()
