"""The evaluation that every run can afford: Frechet distance to held-out images, on the way."""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, extract
from lora_diffusion_jax.evaluation.images import CHUNK, source_batches
from lora_diffusion_jax.evaluation.metrics import frechet_distance
from lora_diffusion_jax.evaluation.report import metric_name
from lora_diffusion_jax.evaluation.statistics import Moments, moments_of


def noise_batches(shape: tuple[int, int, int], count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields `count` images of independent uniform bytes."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        yield rng.integers(0, 256, (min(CHUNK, count - start), *shape), np.uint8)


def feature_moments(detector: Detector, batches: Iterable[np.ndarray]) -> Moments:
    """Returns the moments of the detector's features over an iterable of uint8 batches."""
    return moments_of(
        (features for features, _ in extract(detector, batches)), detector.feature_dim
    )


def distance(first: Moments, second: Moments) -> float:
    """Returns the Frechet distance between two sets of features."""
    return frechet_distance(*first.result(), *second.result())


class QuickEvaluator:
    """Compares samples with held-out real images, beside a floor and a ceiling, again and again.

    What does not depend on the samples is computed at the first call and kept.

    Args:
      train: real images that the model was trained on; their distance is the floor.
      heldout: real images that neither the model nor the detector was trained on.
      detector: the feature space, e.g. from `classifier.fit` or `load_inception`.
      num: number of samples; part of the metric's name.
    """

    def __init__(self, train: Source, heldout: Source, detector: Detector, *, num: int = 1000):
        self.train, self.heldout, self.detector, self.num = train, heldout, detector, num

    @functools.cached_property
    def reference(self) -> Moments:
        """Moments of the held-out images."""
        return feature_moments(self.detector, source_batches(self.heldout))

    @functools.cached_property
    def bounds(self) -> dict[str, float | int]:
        """Floor: `num` training images, or all if fewer (`n_floor`). Ceiling: uniform noise."""
        floor = feature_moments(self.detector, source_batches(self.train, self.num))
        noise = noise_batches(self.heldout.image_shape, self.num)
        ceiling = feature_moments(self.detector, noise)
        return {
            f"{self.name}_floor": distance(floor, self.reference),
            f"{self.name}_ceiling": distance(ceiling, self.reference),
            "n_floor": len(floor),
        }

    @property
    def name(self) -> str:
        """'fd_classifier_1k', or 'fid_2k' in Inception features: to the held-out images."""
        return metric_name("fid", self.detector, self.num)

    def __call__(self, samples: Iterable[np.ndarray]) -> dict[str, float | int | str]:
        """Judges the first `num` of some samples, uint8 batches [n, H, W, C].

        Returns:
          {'fd_classifier_1k', 'fd_classifier_1k_floor', 'fd_classifier_1k_ceiling', 'n',
          'n_reference', 'n_floor', 'features', 'detector_hash'}.

        Raises:
          UserError: fewer than `num` samples.
        """
        drawn = feature_moments(self.detector, take(samples, self.num))
        return {
            self.name: distance(drawn, self.reference),
            **self.bounds,
            "n": len(drawn),
            "n_reference": len(self.reference),
            "features": self.detector.name,
            "detector_hash": self.detector.hash,
        }


def take(batches: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yields the first `count` images of an iterable of batches; too few is a UserError."""
    left = count
    for batch in batches:
        part = np.asarray(batch)[:left]
        left -= len(part)
        yield part
        if left == 0:
            return
    raise UserError(f"{count} images were asked for, but there are only {count - left}.")
