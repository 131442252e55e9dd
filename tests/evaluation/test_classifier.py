import dataclasses

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from lora_diffusion_jax import keys
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.features import extract
from lora_diffusion_jax.evaluation.images import ArraySource, source_batches

TINY = classifier.Settings(widths=(8, 16), feature_dim=16, total_images=64, batch_size=32)


def test_digits_classifier_is_good(detector, digits):
    train, heldout = digits
    assert detector.name == "classifier"
    found = np.argmax(detector.outputs(heldout.images)[1], axis=-1)
    assert np.mean(found == heldout.labels) >= 0.96
    # an outside reader of the features finds the classes too
    parts = [np.concatenate(list(source_batches(s))) for s in digits]
    features = [np.asarray(detector(x)) for x in parts]
    outside = KNeighborsClassifier().fit(features[0], train.labels)
    assert outside.score(features[1], heldout.labels) >= 0.95


def untrained(network, images, labels):
    return jax.device_get(network.init(jax.random.key(0), images[:1] / 255.0)["params"])


def test_same_data_is_read_from_the_cache_and_other_data_is_not(digits, cache, monkeypatch):
    monkeypatch.setattr(classifier, "_train", untrained)
    train, _ = digits
    first = classifier.fit(train, settings=TINY)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "read_images", None)  # the images are not read again
        assert classifier.fit(train, settings=TINY).hash == first.hash
    changed = ArraySource(train.images.copy(), train.labels)
    changed.images[7, 0, 0, 0] ^= 1
    classifier.fit(changed, settings=TINY)
    classifier.fit(train, settings=dataclasses.replace(TINY, seed=1))
    assert len(list(cache.iterdir())) == 3
    file.write_bytes(b"broken")
    with pytest.raises(UserError, match="delete the file"):
        classifier.fit(train, settings=TINY)


def test_random_numbers_belong_to_the_classifier_alone(digits, cache, monkeypatch):
    """The key of its weights is not one that training or sampling with the same seed draws from."""
    used = []
    monkeypatch.setattr(
        classifier.ConvClassifier, "init", lambda self, key, x: used.append(key) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        classifier.fit(digits[0], settings=dataclasses.replace(TINY, seed=3))
    expected = jax.random.fold_in(keys.purpose_key(3, keys.CLASSIFIER), 0)
    assert (jax.random.key_data(used[0]) == jax.random.key_data(expected)).all()


@pytest.mark.parametrize(("shape", "labelled"), [((5, 9, 1), False), ((70, 66, 3), True)])
def test_any_size_and_channels_with_or_without_labels(cache, shape, labelled):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *shape), np.uint8)
    source = ArraySource(images, np.arange(40) % 3 if labelled else None)
    found = classifier.fit(source, settings=TINY)
    assert found.name == ("classifier" if labelled else "rotation")
    features, logits = found.outputs(images)
    assert features.shape == (40, 16)
    assert logits.shape == (40, 3 if labelled else 4)


def test_rotation_features_recognise_turns(digits, cache):
    train, heldout = (ArraySource(source.images) for source in digits)
    settings = classifier.Settings(widths=(16, 32), total_images=4_000)
    found = classifier.fit(train, settings=settings)
    turns = np.arange(len(heldout)) % 4
    turned = np.stack([np.rot90(x, k) for x, k in zip(heldout.images, turns, strict=True)])
    # chance is a quarter; 0, 1 and 8 have no top
    assert np.mean(np.argmax(found.outputs(turned)[1], axis=-1) == turns) > 0.5


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
    with pytest.raises(UserError, match="float32 .* expected uint8"):
        detector(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(UserError, match=r"\(8, 8, 1\); expected"):
        detector(np.zeros((8, 8, 1), np.uint8))
