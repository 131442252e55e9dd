"""What judges a set of images, made and checked before any image is read or sampled."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import report
from lora_diffusion_jax.evaluation.collect import FeatureSet
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.references import choose_detector
from lora_diffusion_jax.evaluation.statistics import Reference, load_reference
from lora_diffusion_jax.processes import is_leader


@dataclasses.dataclass(frozen=True)
class Tools:
    """Metrics, reference and features that fit together.

    Attributes:
      metrics: keys of report.METRICS.
      reference: what images are compared with.
      path: the reference's file.
      detector: the feature space.
    """

    metrics: list[str]
    reference: Reference
    path: str
    detector: Detector

    @property
    def needs_rows(self) -> bool:
        """Whether some metric needs the features of every image, not the moments alone."""
        return set(self.metrics) != {"fid"}

    def check_counts(self, count: int) -> None:
        """Raises UserError where `count` images are too few for a metric."""
        report.check_counts(self.metrics, count, self.reference)

    def check_shape(self, shape: Sequence[int], where: str) -> None:
        """Raises UserError where images (height, width, channels) are not of the reference's shape."""
        theirs = self.reference.meta.get("image_shape") or self.detector.image_shape
        if theirs is not None and tuple(theirs) != tuple(shape):
            raise UserError(
                f"{where} has images of {tuple(shape)} (height, width, channels); the reference "
                f"{self.path} is of {tuple(theirs)}. Choose a reference of the same data set."
            )

    def names(self, count: int) -> list[str]:
        """The names of all numbers that `count` images give."""
        return report.metric_names(self.metrics, self.detector, count)

    def records(self, found: FeatureSet, labels: report.Record) -> Iterable[report.Record]:
        """One labelled record per number, in process 0; none in others, which have no whole sums."""
        if not is_leader():
            return []
        labels = {**labels, "reference": self.path}
        return report.records(self.metrics, found, self.reference, self.detector, labels)


def prepare(
    metrics: str,
    reference: str | os.PathLike[str],
    features: str = "auto",
    inception: str | os.PathLike[str] | None = None,
    dinov2: str | os.PathLike[str] | None = None,
) -> Tools:
    """Reads metrics, reference and detector, and checks them against one another.

    Args:
      metrics: names with commas between, as 'fid,kid'.
      reference: npz file.
      features: one of references.FEATURES.
      inception: Inception weights file, where it is needed and not at its usual place.
      dinov2: DINOv2 weights file, likewise.

    Raises:
      UserError: one of them cannot be read, or they do not fit.
    """
    names = report.parse_metrics(metrics)
    statistics = load_reference(reference)
    detector = choose_detector(features, statistics, inception=inception, dinov2=dinov2)
    report.check_reference(statistics, detector, names)
    return Tools(names, statistics, str(reference), detector)
