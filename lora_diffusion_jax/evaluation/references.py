"""References made of images and a detector, and the detector that a reference carries."""

import os
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.collect import FeatureSet
from lora_diffusion_jax.evaluation.dinov2 import load_dinov2
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.inception import load_inception, present_weights
from lora_diffusion_jax.evaluation.inception_network import POOL_DIM
from lora_diffusion_jax.evaluation.report import code_version, describe, say
from lora_diffusion_jax.evaluation.statistics import Reference

FEATURES = ("auto", "edm", "pytorch-fid", "dinov2", "classifier", "rotation")
INCEPTION_DETECTORS = {"inception_edm": "edm", "inception_pytorch_fid": "pytorch-fid"}
SMALL_BYTES = 64 * 2**20  # features up to this size are kept unasked


def keeps_features(detector: Detector, count: int, asked: bool) -> bool:
    """Whether every image's features go into a reference: where asked, or small."""
    return asked or 4 * count * detector.feature_dim <= SMALL_BYTES


def make_reference(detector: Detector, found: FeatureSet, about: dict[str, Any]) -> Reference:
    """Returns the statistics of a set of images, with their features where those were kept.

    Args:
      detector: the feature space; if it was trained on the data set it goes into the reference.
      found: what the detector saw in the images.
      about: further JSON values for the reference's meta.
    """
    meta = {"n": len(found), **describe(detector), **about, "code_version": code_version()}
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


def choose_detector(
    wanted: str,
    reference: Reference | None = None,
    *,
    inception: str | os.PathLike | None = None,
    dinov2: str | os.PathLike | None = None,
) -> Detector | None:
    """The detector that is asked for, or that a reference was made with.

    Args:
      wanted: one of FEATURES; 'auto' takes the reference's.
      reference: what will be compared with; None: a reference is being made.
      inception: Inception weights file; None: where `load_inception` looks for it.
      dinov2: DINOv2 weights file; None: where `load_dinov2` looks for it.

    Returns:
      The detector; None (only without a reference): one is to be trained on the images themselves.

    Raises:
      UserError: weights that cannot be had or read, or features that are not the reference's.
    """
    if wanted in INCEPTION_DETECTORS.values():
        return load_inception(inception, wanted)
    if wanted == "dinov2":
        return load_dinov2(dinov2)
    if reference is not None:
        return _detector_for(wanted, reference, inception, dinov2)
    if wanted == "auto" and present_weights(inception) is not None:
        return load_inception(inception, "edm")
    return None


def _detector_for(
    wanted: str,
    reference: Reference,
    inception: str | os.PathLike | None,
    dinov2: str | os.PathLike | None,
) -> Detector:
    own = detector_of(reference)
    made_with = reference.meta.get("features", "inception_edm")  # EDM's own files say nothing
    if "features" not in reference.meta and len(reference.mu) != POOL_DIM:
        raise UserError(
            f"The reference has {len(reference.mu)} features and does not say which; Inception's "
            f"are {POOL_DIM}. Make a reference with: eval_fid.py ref"
        )
    if own is not None and wanted in ("auto", own.name):
        return own
    if wanted == "auto" and "features" not in reference.meta:
        say(
            "the reference does not name its features, and is taken to be of EDM's; pytorch-fid's own "
            "are told by --features=pytorch-fid"
        )
    if wanted == "auto" and made_with in INCEPTION_DETECTORS:
        return load_inception(inception, INCEPTION_DETECTORS[made_with])
    if wanted == "auto" and str(made_with).startswith("dinov2"):
        return load_dinov2(dinov2)
    raise UserError(
        f"The reference was made with {made_with} features, which --features={wanted} cannot "
        "give. Leave --features out, or make a reference with it."
    )
