import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lora_diffusion_jax.evaluation import classifier
from lora_diffusion_jax.evaluation.images import ArraySource


@pytest.fixture(scope="session")
def digits():
    """Real 8x8 digits: (train, heldout) sources of 1,500 and 297 images."""
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    parts = order[297:], order[:297]
    return tuple(ArraySource(images[part], data.target[part]) for part in parts)


@pytest.fixture(scope="session")
def detector(digits, tmp_path_factory):
    """The classifier's features of digits, trained for a third of the default's time."""
    train, _ = digits
    settings = classifier.default_settings(train.image_shape)
    settings = dataclasses.replace(settings, total_images=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        return classifier.fit(train, settings=settings)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
