"""The Inception detectors on random weights; golden/ holds pytorch-fid's outputs for the same.

Reference outputs: benchmarks/eval_against_torch.py (torch 2.13, pytorch-fid 0.3.0).
"""

import hashlib
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.ndimage import map_coordinates

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import inception, resize
from lora_diffusion_jax.evaluation.inception import load_inception

from . import random_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "inception_pytorch_fid.npz"


def images_of(shape):
    """The images that the reference outputs were made of."""
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    ramp = np.linspace(0, 190, shape[1]).astype(np.uint8)
    images[1::3] = images[1::3] // 4 + ramp[None, None, :, None]
    return images


@pytest.fixture(scope="module")
def weights():
    return random_weights.inception_state_dict()


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    """The random weights as safetensors."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def detectors(weights_file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: load_inception(weights_file, name) for name in ("edm", "pytorch-fid")}


@pytest.mark.parametrize(
    ("detector", "sizes"), [("edm", ("8x8x1", "32x48x3")), ("pytorch-fid", ("320x400x1",))]
)
def test_features_and_logits_equal_pytorch_fids(detectors, detector, sizes):
    golden = np.load(GOLDEN)
    for size in sizes:
        expected = [golden[f"{size}/{detector}/{part}"] for part in ("features", "logits")]
        images = images_of(tuple(map(int, size.split("x"))))[: len(expected[0])]
        for got, want in zip(detectors[detector].outputs(images), expected, strict=True):
            # float32 sums in another order through 94 layers
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_contract(detectors, weights_file):
    with pytest.warns(UserWarning, match="Distances made with it are not FIDs"):
        features = load_inception(weights_file)
    images = images_of((32, 48, 3))[:2]
    assert features(images).shape == (2, 2048)
    assert features(images).dtype == np.float32
    assert features.details["verified"] == 0
    assert features.hash == detectors["edm"].hash
    assert features.hash != detectors["pytorch-fid"].hash  # the same weights, other features


def test_gray_images_become_three_equal_channels():
    gray = images_of((32, 48, 1))
    for prepare in resize.PREPROCESS.values():
        # Up to float32's last bit: one channel and three are summed by different kernels.
        found, expected = prepare(gray), prepare(gray.repeat(3, axis=-1))
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("size", [1, 2, 32, 299, 500])
def test_resize_matrices_interpolate_linearly(size):
    pixels = np.random.default_rng(size).uniform(0, 255, size)
    targets = np.arange(299)
    for matrix, source in (
        (resize.tf1_weights(size), targets * size / 299),
        (resize.half_pixel_weights(size), (targets + 0.5) * size / 299 - 0.5),
    ):
        expected = map_coordinates(pixels, [np.clip(source, 0, size - 1)], order=1, mode="nearest")
        np.testing.assert_allclose(matrix @ pixels, expected, atol=2e-4)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_images_of_the_networks_size_are_not_resized():
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    x = images.astype(np.float32)
    np.testing.assert_array_equal(resize.PREPROCESS["edm"](images), (x - 128) / 128)
    np.testing.assert_allclose(resize.PREPROCESS["pytorch-fid"](images), x / 127.5 - 1, atol=1e-6)


def test_folding_batch_norm_changes_nothing(weights):
    name = "Mixed_5b.branch5x5_2"
    params = inception.to_params(weights)["Mixed_5b"]["branch5x5_2"]
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 48)).astype(np.float32)
    kernel = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0)

    def conv(kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    part = {p: weights[f"{name}.bn.{p}"] for p in ("weight", "bias", "running_mean", "running_var")}
    normed = (conv(kernel) - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-3)
    expected = normed * part["weight"] + part["bias"]
    np.testing.assert_allclose(conv(params["kernel"]) + params["bias"], expected, atol=2e-5)


def test_weight_count_is_the_published_networks():
    # torchvision's 27,161,264 parameters without the auxiliary head's 3,326,696, and 8 more
    # classes of 2,049 parameters each
    shapes = inception.expected_shapes()
    learned = sum(int(np.prod(s)) for n, s in shapes.items() if "running" not in n)
    assert learned == 27_161_264 - 3_326_696 + 8 * 2_049
    assert sum(name.endswith("conv.weight") for name in shapes) == 94
    assert shapes == random_weights.inception_shapes()


@pytest.mark.parametrize("claim", [True, False])
def test_no_file_can_call_itself_published(weights, tmp_path, claim):
    meta = {"inception": json.dumps({"source_sha256": inception.FILE_SHA256}), "verified": "1"}
    path = tmp_path / "claims.safetensors"
    save_file(weights, path, metadata=meta if claim else None)
    with pytest.warns(UserWarning, match="not the published file"):
        assert load_inception(path).details["verified"] == 0


def test_the_published_hash_is_what_verifies(weights, tmp_path, monkeypatch):
    path = tmp_path / "real.safetensors"
    save_file(weights, path)
    monkeypatch.setattr(inception, "FILE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_inception(path).details["verified"] == 1


def test_wrong_weights_are_plain_errors(weights, tmp_path):
    def wrong(match, path):
        with pytest.raises(UserError, match=match):
            load_inception(path)

    wrong("6726825d0af5f729", tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    wrong("text file", tmp_path / "text.pth")
    less = {k: v for k, v in weights.items() if k != "fc.bias"}
    save_file(less, tmp_path / "less.safetensors")
    wrong(
        r"does not hold the weights .*: fc.bias is missing, expected \(1008,\)\. ",
        tmp_path / "less.safetensors",
    )
    torchvisions = weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    save_file(torchvisions, tmp_path / "other.safetensors")
    wrong(r"fc.weight is \(1000, 2048\), expected \(1008, 2048\)", tmp_path / "other.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    wrong(r"is missing, expected .* \(472 more differences\)", tmp_path / "foreign.safetensors")
    broken = weights | {"fc.weight": np.full((1008, 2048), np.nan, np.float32)}
    save_file(broken, tmp_path / "nan.safetensors")
    wrong("fc.weight holds NaN", tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="no detector 'clean'"):
        load_inception(tmp_path / "nan.safetensors", "clean")


def test_weights_are_found_by_argument_environment_and_cache(weights_file, tmp_path, monkeypatch):
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path))
    assert inception.present_weights() is None
    (tmp_path / inception.FILE_NAME).write_bytes(b"cached")
    assert inception.present_weights() == tmp_path / inception.FILE_NAME
    monkeypatch.setenv(inception.VARIABLE, str(weights_file))
    assert inception.present_weights() == weights_file
    assert inception.present_weights(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("good", [True, False])
def test_downloads_are_verified(tmp_path, monkeypatch, good):
    served = tmp_path / "served"
    served.write_bytes(b"weights" if good else b"a proxy's web page")
    monkeypatch.setattr(inception, "URL", served.as_uri())
    monkeypatch.setattr(inception, "FILE_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    if good:
        assert inception.find_weights().read_bytes() == b"weights"
    else:
        with pytest.raises(UserError, match="has the sha256"):
            inception.find_weights()
        assert not list((tmp_path / "cache").iterdir())
