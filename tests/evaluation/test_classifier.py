import dataclasses

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.features import extract
from lora_diffusion_jax.evaluation.images import ArraySource, source_batches
from lora_diffusion_jax.evaluation.quick import (
    QuickEvaluator,
    distance,
    feature_moments,
    noise_batches,
    take,
)

TINY = classifier.Settings(widths=(8, 16), feature_dim=16, total_images=64, batch_size=32)


def test_digits_classifier_is_good(detector, digits):
    train, heldout = digits
    assert detector.name == "classifier"
    assert detector.details["test_accuracy"] >= 0.97
    # an outside reader of the features finds the classes too
    parts = [np.concatenate(list(source_batches(s))) for s in digits]
    features = [np.asarray(detector(x)) for x in parts]
    outside = LogisticRegression(max_iter=2000).fit(features[0], train.labels)
    assert outside.score(features[1], heldout.labels) >= 0.95


def test_the_quick_evaluation_names_counts_and_orders(detector, digits):
    train, heldout = digits
    blurred = (b // 2 + np.roll(b, 1, axis=2) // 2 for b in source_batches(train))
    report = QuickEvaluator(train, heldout, detector, num=1000)(blurred)
    floor, value, ceiling = (report[f"fd_classifier_1k{s}"] for s in ("_floor", "", "_ceiling"))
    assert 0 < floor < value < ceiling
    assert (report["n"], report["n_reference"]) == (1000, 297)
    assert report["detector_hash"] == detector.hash
    with pytest.raises(UserError, match="2000 images were asked for, but there are only 1500"):
        QuickEvaluator(train, heldout, detector, num=2000)(source_batches(train))


def test_same_data_is_read_from_the_cache_and_other_data_is_not(digits, tmp_path, monkeypatch):
    def untrained(network, images, labels, progress):
        return jax.device_get(network.init(jax.random.key(0), images[:1] / 255.0)["params"])

    monkeypatch.setattr(classifier, "_train", untrained)
    train, _ = digits
    fit = {"settings": TINY, "cache_dir": tmp_path, "progress": False}
    first = classifier.fit(train, **fit)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "read_images", None)  # the images are not read again
        assert classifier.fit(train, **fit).hash == first.hash
    assert file.stat().st_mtime_ns == stamp
    changed = ArraySource(train.images.copy(), train.labels)
    changed.images[7, 0, 0, 0] ^= 1
    classifier.fit(changed, **fit)
    classifier.fit(train, **{**fit, "settings": dataclasses.replace(TINY, seed=1)})
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(b"broken")
    with pytest.raises(UserError, match="delete the file"):
        classifier.fit(train, **fit)


@pytest.mark.parametrize(("shape", "labelled"), [((5, 9, 1), False), ((70, 66, 3), True)])
def test_any_size_and_channels_with_or_without_labels(tmp_path, shape, labelled):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *shape), np.uint8)
    source = ArraySource(images, np.arange(40) % 3 if labelled else None)
    found = classifier.fit(source, settings=TINY, cache_dir=tmp_path, progress=False)
    assert found.name == ("classifier" if labelled else "rotation")
    features, logits = found.outputs(images)
    assert features.shape == (40, 16)
    assert logits.shape == (40, 3 if labelled else 4)


def test_rotation_features_order_real_above_noise(digits, tmp_path):
    train, heldout = (ArraySource(source.images) for source in digits)
    settings = classifier.Settings(widths=(16, 32), total_images=4_000)
    found = classifier.fit(
        train, test_source=heldout, settings=settings, cache_dir=tmp_path, progress=False
    )
    assert found.details["test_accuracy"] > 0.5  # chance is a quarter; 0, 1 and 8 have no top
    real, held, noise = (
        feature_moments(found, batches)
        for batches in (
            source_batches(train, 500),
            source_batches(heldout),
            noise_batches((8, 8, 1), 500),
        )
    )
    assert 5 * distance(real, held) < distance(noise, held)


def test_batch_size_changes_no_bit(detector, digits):
    images = digits[0].images[:173]
    whole = np.concatenate([f for f, _ in extract(detector, [images])])
    for size in (1, 50, 64):
        pieces = [images[i : i + size] for i in range(0, 173, size)]
        parts = np.concatenate([f for f, _ in extract(detector, pieces)])
        np.testing.assert_array_equal(parts, whole)
    # the padded rows of the last batch do not leak into its features: other program, same values
    np.testing.assert_allclose(whole, np.asarray(detector(images)), atol=2e-5)


def test_wrong_images_are_plain_errors(detector):
    with pytest.raises(UserError, match="made for 8x8x1"):
        detector(np.zeros((2, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        detector(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(UserError, match="channels"):
        detector(np.zeros((8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="same size"):
        list(extract(detector, [np.zeros((1, s, 8, 1), np.uint8) for s in (8, 9)]))


def test_take_stops_early_and_counts():
    batches = [np.zeros((4, 1)), np.zeros((4, 1)), np.zeros((4, 1))]
    assert [len(b) for b in take(batches, 6)] == [4, 2]
    with pytest.raises(UserError, match="only 12"):
        list(take(batches, 13))
