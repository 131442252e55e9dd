"""References made of images and a detector, and the detector that a reference carries."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.collect import collect
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.inception import load_inception
from lora_diffusion_jax.evaluation.report import code_version, describe
from lora_diffusion_jax.evaluation.statistics import Reference

INCEPTION_DETECTORS = {"inception_edm": "edm", "inception_pytorch_fid": "pytorch-fid"}
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


def published_detector(reference: Reference, inception: str | os.PathLike | None) -> Detector:
    """The detector that a reference was made with: the one it carries, or Inception's variant.

    Args:
        reference: statistics; EDM's own files, which say nothing, are of the `edm` variant.
        inception: weights file; None: where `load_inception` looks for it.

    Raises:
        UserError: features that are neither, or weights that cannot be had.
    """
    own = detector_of(reference)
    if own is not None:
        return own
    made_with = reference.meta.get("features", "inception_edm")
    if made_with not in INCEPTION_DETECTORS:
        raise UserError(
            f"The reference was made with {made_with} features, which training does not compute; "
            "use eval_fid.py, or a reference of Inception or classifier features."
        )
    return load_inception(inception or None, INCEPTION_DETECTORS[made_with])
