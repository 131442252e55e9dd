"""DINOv2 features on random weights; golden/ holds what PyTorch 2.13 made of the same.

The reference was written with torch's own conv2d, interpolate (bicubic, antialias; and bicubic with
scale_factor (16 + 0.1) / 37 for the positions), layer_norm and scaled_dot_product_attention.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import dinov2, resize

from . import random_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_torch.npz"
SHAPES = ((8, 8, 1), (32, 32, 3), (224, 224, 3), (300, 260, 3))  # in the order they were drawn


@pytest.fixture(scope="module")
def weights():
    return random_weights.dinov2_state_dict(width=128, depth=3)


def test_features_equal_pytorchs(weights):
    detector = dinov2.make_detector(weights, Path("random"), "")
    golden = np.load(GOLDEN)
    rng = np.random.default_rng(0)
    images = {shape: rng.integers(0, 256, (2, *shape), np.uint8) for shape in SHAPES}
    for name in golden:
        features = np.asarray(detector(images[tuple(map(int, name.split("x")))]))
        # float32 sums in another order
        assert np.abs(features - golden[name]).max() < 1e-5 * np.abs(golden[name]).max()
    assert detector.name == "dinov2_128x3"
    assert not detector.has_classes


@pytest.mark.parametrize("size", [8, 32, 224, 500])
def test_resize_is_pillows_bicubic(size):
    image = np.random.default_rng(size).uniform(0, 255, (size, size)).astype(np.float32)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    matrix = resize.bicubic_weights(size).astype(np.float64)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=1e-3)


def test_names_and_shapes_are_the_official_ones():
    expected = random_weights.dinov2_shapes(128, 2, 1370)
    assert dinov2.expected_shapes(128, 2, 1370) == expected


def test_other_networks_are_plain_errors(weights):
    for change, found in (
        ({"register_tokens": np.zeros((1, 4, 128), np.float32)}, "register_tokens"),
        ({"norm.weight": np.zeros(64, np.float32)}, "norm.weight is"),
        ({"pos_embed": np.zeros((1, 1000, 128), np.float32)}, "pos_embed"),
    ):
        with pytest.raises(UserError, match=found):
            dinov2.make_detector(weights | change, Path("other.pth"), "")
    with pytest.raises(UserError, match="another network"):
        dinov2.make_detector({"a": np.zeros(3)}, Path("other.pth"), "")
