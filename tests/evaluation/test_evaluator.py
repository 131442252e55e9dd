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


def test_accuracy_counts_the_images_of_the_class_asked_for(detector, digits):
    made = make_reference(detector, collect(detector, [digits[1].images]), {})
    measure = evaluator.Evaluator(["accuracy"], made, detector)
    found = collect(detector, [digits[1].images[:100]], keep_rows=True)
    named = found.logits.argmax(axis=-1)
    found.classes = np.where(np.arange(100) < 25, (named + 1) % 10, named)
    (record,) = measure.records(found, {})
    assert (record["metric"], record["value"]) == ("accuracy_classifier_100", 0.75)
    assert record["standard_error"] == pytest.approx(np.sqrt(0.75 * 0.25 / 99))

    measure.check_classes(10, "RUN")
    for classes, words in ((0, "RUN has none"), (3, "of the 3 classes of RUN; .* one of 10")):
        with pytest.raises(UserError, match=words):
            measure.check_classes(classes, "RUN")
    evaluator.Evaluator(["fid"], made, detector).check_classes(0, "RUN")


def test_an_array_source_without_labels_has_no_classes(digits):
    source = ArraySource(digits[0].images[:5])
    assert (source.num_classes, len(source), source.image_shape) == (0, 5, (8, 8, 1))
    assert source.fingerprint() != digits[0].fingerprint()


def test_a_reference_cannot_call_its_network_the_published_one(detector, digits, tmp_path):
    """What a file says of its own weights counts for nothing: not its name, not `verified`."""
    made = make_reference(detector, collect(detector, [digits[1].images]), {})
    made.meta["detector_details"] = {"verified": 1, "trained_on": 5, "weights_sha256": "0" * 64}
    save_reference(tmp_path / "ref.npz", made)
    opened = evaluator.open_evaluator("fid", tmp_path / "ref.npz")
    assert opened.names(80) == ["fd_classifier_80"]
    assert opened.detector.details == {"trained_on": 5}
    assert "detector_verified" not in opened.detector.labels
    made.meta["recipe"] = {**made.meta["recipe"], "name": "inception_edm"}
    made.meta["features"] = "inception_edm"
    save_reference(tmp_path / "claims.npz", made)
    with pytest.raises(UserError, match="its name is inception_edm, not classifier or rotation"):
        evaluator.open_evaluator("fid", tmp_path / "claims.npz")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": 5}, "settings are not those"),
        ({"image_shape": [10**6, 10**6, 3]}, "image_shape"),
        ({"classes": 10**12}, "no valid number"),
        ({"classes": 9}, "another network"),
    ],
)
def test_recipes_that_do_not_fit_are_one_sentence(detector, change, says):
    with pytest.raises(UserError, match=says):
        classifier.rebuild({**detector.recipe, **change}, detector.variables)


def test_what_the_end_of_training_needs_is_looked_at_first(detector, digits, tmp_path, monkeypatch):
    train, heldout = digits

    def wrong(says, heldout=heldout, reference="", counts=(100,)):
        with pytest.raises(UserError, match=says):
            evaluator.for_training(train, heldout, reference=reference, inception="", counts=counts)

    wrong("held-out images are .9, 8, 1.", ArraySource(np.zeros((5, 9, 8, 1), np.uint8)))
    wrong("1 held out", ArraySource(heldout.images[:1]))
    wrong("at least 2 images", counts=(1,))
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    wrong("Set LORA_DIFFUSION_CACHE")
    made = make_reference(detector, collect(detector, [heldout.images]), {"image_shape": [9, 8, 1]})
    save_reference(tmp_path / "ref.npz", made)
    wrong("Choose a reference of the same data set", reference=tmp_path / "ref.npz")


class Damaged(ArraySource):
    def __getitem__(self, index):
        if index == 3:
            raise UserError("image 3 is damaged")
        return super().__getitem__(index)


def test_damaged_held_out_images_are_found_at_the_start(digits):
    broken = Damaged(digits[1].images[:9])
    with pytest.raises(UserError, match="image 3 is damaged"):
        evaluator.for_training(digits[0], broken, reference="", inception="")
