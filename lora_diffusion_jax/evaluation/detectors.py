"""Which detector --features names, or a reference was made with."""

import os

from flax.traverse_util import unflatten_dict

from lora_diffusion_jax.array_types import Source
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.dinov2 import load_dinov2
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.inception import load_inception, present_weights
from lora_diffusion_jax.evaluation.inception_network import POOL_DIM
from lora_diffusion_jax.evaluation.references import Reference
from lora_diffusion_jax.evaluation.results import note

FEATURES = ("auto", "edm", "pytorch-fid", "dinov2", "classifier", "rotation")
_INCEPTION = {"inception_edm": "edm", "inception_pytorch_fid": "pytorch-fid"}
File = str | os.PathLike[str] | None  # of weights; None: the usual places


def _published(features: str | None, inception: File, dinov2: File) -> Detector | None:
    if features == "dinov2":
        return load_dinov2(dinov2)
    if features is not None and features in _INCEPTION.values():
        return load_inception(inception, features)
    return None


def detector_for_source(
    source: Source, features: str, inception: File = None, dinov2: File = None
) -> Detector:
    """The detector that a new reference of some images is made with.

    Args:
        source: the images.
        features: one of FEATURES; 'auto': Inception's if its weights are present, else a network
            trained on the images now.
        inception: Inception weights file.
        dinov2: DINOv2 weights file.

    Raises:
        UserError: weights that are missing or damaged, or no classes to train on.
    """
    if features == "auto" and present_weights(inception) is not None:
        features = "edm"
    detector = _published(features, inception, dinov2)
    if detector is None:
        if features == "classifier" and source.num_classes < 2:
            raise UserError(
                "The images have no classes to learn. Use --features=rotation, or --class_folders "
                "if each class has a folder."
            )
        detector = classifier.fit(source, use_labels=features != "rotation")
        note(f"features: {detector.name}, trained on these images")
    return detector


def detector_for_reference(
    reference: Reference, features: str = "auto", inception: File = None, dinov2: File = None
) -> Detector:
    """The detector that a reference was made with ('auto'), or the one that `features` names.

    Raises:
        UserError: weights that are missing or damaged, or features that the reference lacks.
    """
    meta = reference.meta
    made_with, recipe = meta.get("features"), meta.get("recipe")
    if recipe is not None and features in ("auto", made_with):
        variables = unflatten_dict(dict(reference.weights), sep="/")
        return classifier.rebuild(recipe, variables, meta.get("detector_details"))
    wanted = features
    if features == "auto":
        if made_with is None and len(reference.mu) == POOL_DIM:
            made_with = "inception_edm"  # EDM's own files name nothing
            note(
                "the reference does not name its features; assuming EDM's. Use "
                "--features=pytorch-fid for a reference made with pytorch-fid"
            )
        is_dinov2 = str(made_with).startswith("dinov2")
        wanted = "dinov2" if is_dinov2 else _INCEPTION.get(str(made_with))
    detector = _published(wanted, inception, dinov2)
    if detector is None:
        raise UserError(
            f"The reference was made with {len(reference.mu)} features named {printable(made_with)}, which "
            f"--features={features} does not provide. Omit --features, or make a reference with it."
        )
    return detector
