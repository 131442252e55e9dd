import numpy as np
import pytest
from sklearn.datasets import load_digits

from lora_diffusion_jax.evaluation import classifier


class ArraySource:
    """Images and labels in memory, behind the Source protocol."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels
        self.image_shape = images.shape[1:]
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.class_names = [str(i) for i in range(self.num_classes)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        label = 0 if self.labels is None else self.labels[index]
        return {"image": self.images[index], "label": np.int32(label)}


@pytest.fixture(scope="session")
def make_source():
    return ArraySource


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
    """The classifier's features of digits, with the default settings."""
    train, heldout = digits
    folder = tmp_path_factory.mktemp("cache")
    return classifier.fit(train, test_source=heldout, cache_dir=folder, progress=False)
