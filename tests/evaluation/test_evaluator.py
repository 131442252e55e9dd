"""The evaluation of training runs, and what an Evaluator refuses."""

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier, evaluator
from lora_diffusion_jax.evaluation.collect import collect
from lora_diffusion_jax.evaluation.images import ArraySource, first_images, source_batches
from lora_diffusion_jax.evaluation.metrics import frechet_distance
from lora_diffusion_jax.evaluation.references import make_reference, save_reference


def blurred(source):
    return (b // 2 + np.roll(b, 1, axis=2) // 2 for b in source_batches(source))


def test_training_is_compared_with_held_out_images(detector, digits, monkeypatch):
    train, heldout = digits
    fits = []
    monkeypatch.setattr(classifier, "fit", lambda source: fits.append(source) or detector)
    measure = evaluator.for_training(train, heldout, reference="", inception="")
    assert not fits  # at the first evaluation
    found = [measure(blurred(train), 1000) for _ in range(2)]
    assert found[0] == found[1]
    assert fits == [train]
    assert set(found[0]) == {f"fd_classifier_1k{end}" for end in ("", "_floor", "_ceiling")}
    floor, value, ceiling = (
        found[0][f"fd_classifier_1k{end}"] for end in ("_floor", "", "_ceiling")
    )
    assert 0 < floor < value < ceiling
    real, drawn = (collect(detector, [x]) for x in (heldout.images, train.images[:1000]))
    expected = frechet_distance(*drawn.moments.result(), *real.moments.result())
    assert floor == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="2000 images were requested, but there are only 1500"):
        measure(source_batches(train), 2000)


def test_training_is_compared_with_a_reference(detector, digits, tmp_path):
    train, heldout = digits
    made = make_reference(detector, collect(detector, [heldout.images]), {})
    save_reference(tmp_path / "ref.npz", made)
    measure = evaluator.for_training(train, None, reference=tmp_path / "ref.npz", inception="")
    found = measure(source_batches(heldout), 297)
    assert set(found) == {"fd_classifier_297"}
    assert abs(found["fd_classifier_297"]) < 1e-9
    with pytest.raises(UserError, match="no reference file"):
        evaluator.for_training(train, None, reference="/no.npz", inception="")


def test_nothing_to_compare_training_with(digits, capsys):
    assert evaluator.for_training(digits[0], None, reference="", inception="") is None
    assert "set data.eval_path" in capsys.readouterr().err


def test_first_images_stop_early_and_count():
    batches = [np.zeros((4, 1)), np.zeros((4, 1)), np.zeros((4, 1))]
    assert [len(b) for b in first_images(batches, 6)] == [4, 2]
    with pytest.raises(UserError, match="only 12"):
        list(first_images(batches, 13))


def test_references_of_other_weights_are_refused(detector, digits):
    made = make_reference(detector, collect(detector, [digits[1].images]), {})
    evaluator.Evaluator(["fid"], made, detector)
    made.meta["detector_hash"] = "0" * 16
    with pytest.raises(UserError, match="detector hash 0000.* Use the same --features"):
        evaluator.Evaluator(["fid"], made, detector)


def test_an_array_source_without_labels_has_no_classes(digits):
    source = ArraySource(digits[0].images[:5])
    assert (source.num_classes, len(source), source.image_shape) == (0, 5, (8, 8, 1))
    assert source.fingerprint() != digits[0].fingerprint()
