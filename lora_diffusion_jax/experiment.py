"""The evaluation during training."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lora_diffusion_jax import factory, processes
from lora_diffusion_jax.evaluation import classifier, quick, references
from lora_diffusion_jax.evaluation.features import Detector
from lora_diffusion_jax.evaluation.metrics import frechet_distance
from lora_diffusion_jax.evaluation.report import check_reference, metric_name
from lora_diffusion_jax.evaluation.statistics import load_reference
from lora_diffusion_jax.training import loop, writers

Judge = Callable[[Iterable[np.ndarray], int], dict[str, float]]


def _judge(config: ConfigDict, source: Any) -> Judge | None:
    """(samples, number) -> distances by name; None where there is nothing to compare with.

    Against eval.reference in its own features (`fid_2k`), or against the held-out images in those of
    a classifier trained on the training images (`fd_classifier_1k`), beside floor and ceiling.
    """
    if not config.eval.num_samples:
        return None
    if config.eval.reference:
        reference = load_reference(config.eval.reference)  # now, rather than after hours
        detector = references.choose_detector(
            "auto", reference, inception=config.eval.inception or None
        )
        check_reference(reference, detector, ["fid"])

        def against_reference(samples: Iterable[np.ndarray], count: int) -> dict[str, float]:
            drawn = quick.feature_moments(detector, quick.take(samples, count))
            value = frechet_distance(
                *drawn.result(), reference.mu, reference.sigma, root2=reference.root
            )
            return {metric_name("fid", detector, count): value}

        return against_reference
    heldout = factory.open_heldout(config)
    if heldout is None:
        writers.say(
            "no evaluation: there are no held-out images; name some (data.eval_path) or statistics "
            "(eval.reference)"
        )
        return None

    @functools.cache
    def detector() -> Detector:  # at the first evaluation: training it takes a while
        fitted = classifier.fit(source, test_source=heldout)
        # Each process has trained it, or found it in its cache; they must have come to the same.
        processes.barrier("training the feature network", loop.COMPILE_LIMIT)
        processes.check_same("the feature network", fitted.hash)
        return fitted

    @functools.cache
    def evaluator(count: int) -> quick.QuickEvaluator:
        return quick.QuickEvaluator(source, heldout, detector(), num=count)

    def against_heldout(samples: Iterable[np.ndarray], count: int) -> dict[str, float]:
        return {k: v for k, v in evaluator(count)(samples).items() if k.startswith("fd_")}

    return against_heldout
