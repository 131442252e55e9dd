"""References made of images and a detector, and the detector that a reference carries."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.collect import collect
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.report import code_version, describe
from lora_diffusion_jax.evaluation.statistics import Reference

SMALL_BYTES = 64 * 2**20  # features up to this size are kept unasked


def make_reference(
    detector: Detector,
    batches: Iterable[np.ndarray],
    count: int,
    keep_features: bool,
    about: dict[str, Any],
) -> Reference:
    """Returns the statistics of `count` images, uint8 batches [n, H, W, C].

    Args:
      detector: the feature space; if it was trained on the data set it goes into the reference.
      batches: the images.
      count: how many there must be.
      keep_features: keep every image's features even where they are large.
      about: further JSON values for the reference's meta.
    """
    keep = keep_features or 4 * count * detector.feature_dim <= SMALL_BYTES
    found = collect(detector, batches, keep_rows=keep, total=count, progress=True)
    meta = {"n": count, **describe(detector), **about, "code_version": code_version()}
    weights: dict[str, np.ndarray] = {}
    if detector.recipe is not None:
        meta |= {"recipe": detector.recipe, "detector_details": detector.details}
        flat = flatten_dict(detector.variables, sep="/")
        weights = {name: np.asarray(value) for name, value in flat.items()}
    mu, sigma = found.moments.result()
    return Reference(mu, sigma, meta, found.features, weights)


def detector_of(reference: Reference) -> Detector | None:
    """The detector that a reference carries; None where its features are of a published network."""
    recipe = reference.meta.get("recipe")
    if recipe is None:
        return None
    variables = unflatten_dict(dict(reference.weights), sep="/")
    return classifier.rebuild(recipe, variables, reference.meta.get("detector_details"))
