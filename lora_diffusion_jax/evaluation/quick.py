"""The evaluation that every run can afford: Frechet distance in the dataset's own features."""

from collections.abc import Iterable, Iterator

import numpy as np

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.features import Detector, extract
from lora_diffusion_jax.evaluation.metrics import count_name, frechet_distance
from lora_diffusion_jax.evaluation.statistics import Moments, moments_of

CHUNK = 250  # images read at a time


def source_batches(
    source: Source, count: int | None = None, *, skip: int = 0
) -> Iterator[np.ndarray]:
    """Yields uint8 batches [n, H, W, C] of the images skip .. skip + count - 1 of a source."""
    stop = len(source) if count is None else min(len(source), skip + count)
    for start in range(skip, stop, CHUNK):
        yield np.stack([source[i]["image"] for i in range(start, min(start + CHUNK, stop))])


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


def quick_report(
    samples: Iterable[np.ndarray],
    train: Source,
    heldout: Source,
    detector: Detector,
    *,
    num: int = 1000,
) -> dict[str, float | int | str]:
    """Compares `num` samples with held-out real images, beside a floor and a ceiling.

    Args:
      samples: uint8 batches [n, H, W, C], at least `num` images in all; the first `num` count.
      train: real images that the model was trained on; the floor is their distance.
      heldout: real images that neither the model nor the detector was trained on.
      detector: the feature space, e.g. from `classifier.fit`.
      num: number of samples; part of the metric's name.

    Returns:
      {'fd_classifier_1k': ..., 'fd_classifier_1k_floor': real training images against held-out
      ones, 'fd_classifier_1k_ceiling': uniform noise against them, and the counts}. With fewer
      than `num` training images the floor is over all of them, as `n_floor` says.
    """
    reference = feature_moments(detector, source_batches(heldout))
    drawn = feature_moments(detector, take(samples, num))
    floor = feature_moments(detector, source_batches(train, num))
    ceiling = feature_moments(detector, noise_batches(heldout.image_shape, num))
    name = f"fd_{detector.name}_{count_name(num)}"
    return {
        name: distance(drawn, reference),
        f"{name}_floor": distance(floor, reference),
        f"{name}_ceiling": distance(ceiling, reference),
        "n": len(drawn),
        "n_reference": len(reference),
        "n_floor": len(floor),
        "features": detector.name,
        "detector_hash": detector.hash,
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
