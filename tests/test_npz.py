"""Untrusted npz files."""

import io
import json
import zipfile

import numpy as np
import pytest

from lora_diffusion_jax import npz as npz_module
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.images import open_npz
from lora_diffusion_jax.evaluation.references import load_reference
from lora_diffusion_jax.npz import read_npz
from tests.test_untrusted import fuzz

RNG = np.random.default_rng(0)
ARRAYS = {
    "images": RNG.integers(0, 256, (5, 4, 4, 3), np.uint8),
    "fortran": np.asfortranarray(RNG.normal(size=(3, 4))),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 7), np.float32),
    "text": np.array('{"a": 1}'),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_does(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    names, arrays = read_npz(tmp_path / "x.npz", lambda name: True, "x")
    assert names == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert list(read_npz(tmp_path / "x.npz", "scalar".__eq__, "x")[1]) == ["scalar"]


@pytest.mark.parametrize("shape", [(3, 0, 4, 3), (3, 4, 0, 3), (0, 4, 4, 3), (3, 4, 4, 0)])
def test_images_without_pixels_are_refused(tmp_path, shape):
    np.savez(tmp_path / "x.npz", images=np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"of shape \(.*; expected uint8 \[N, height"):
        open_npz(tmp_path / "x.npz")


def npy(shape, data, dtype="|u1", version=(1, 0)):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0
    write(file, header)
    text = file.getvalue()
    return text[:6] + bytes(version) + text[8:] + data


BAD = {
    "4 TB": (npy((2**42,), bytes(100)), "declares the shape .4398046511104. .*holds 100 bytes"),
    "overflow": (npy((2**40, 2**40), bytes(100)), "declares the shape"),
    "negative": (npy((-100,), bytes(100)), "declares the shape"),
    "short": (npy((101,), bytes(100)), "declares the shape"),
    "long": (npy((99,), bytes(100)), "declares the shape"),
    "zero and huge": (npy((0, 2**62, 2**62), b""), "cannot be read as npz"),
    "objects": (npy((1,), bytes(8), "|O"), "need pickle"),
    "no size": (npy((9,), b"", "|V0"), "expected uint8"),
    "python": (npy("__import__('os')", b""), "cannot be read as npz"),
    "version": (npy((1,), b"x", version=(9, 0)), "cannot be read as npz"),
    "no header": (b"hello", "cannot be read as npz"),
    "nothing": (b"", "cannot be read as npz"),
    "dimensions": (npy((1,) * 100, b"x"), "cannot be read as npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_lie_are_one_sentence(tmp_path, case):
    data, says = BAD[case]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", data)
    with pytest.raises(UserError, match=says) as caught:
        open_npz(tmp_path / "x.npz")
    assert str(caught.value).isprintable()


def test_what_packing_may_add_is_bounded(tmp_path, monkeypatch):
    """16 times a small file, and twice a large one beyond a constant: noise of that share is fine."""
    noise, zeros = RNG.bytes(1 << 20), bytes(6 << 20)
    for name, share in (("fine", 4 << 20), ("much", 6 << 20)):
        images = np.frombuffer(noise + zeros[:share], np.uint8).reshape(-1, 1024, 1024, 1)
        np.savez_compressed(tmp_path / f"{name}.npz", images=images)
    assert len(open_npz(tmp_path / "much.npz")) == 7
    monkeypatch.setattr(npz_module, "ADDED", 3 << 20)
    assert len(open_npz(tmp_path / "fine.npz")) == 5
    with pytest.raises(UserError, match=r"unpacks to 7,34.,... bytes, far more than its own size"):
        open_npz(tmp_path / "much.npz")


@pytest.mark.parametrize(("count", "rows"), [(None, 0), (None, 1), (5, 0), (5, 4), (5, 6)])
def test_a_reference_has_a_row_per_image(tmp_path, count, rows):
    def save(rows):
        meta = {} if count is None else {"meta": np.array(json.dumps({"n": count}))}
        features = np.zeros((rows, 2), np.float32)
        np.savez(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2), features=features, **meta)
        return load_reference(tmp_path / "r.npz")

    assert len(save(5).features) == 5
    with pytest.raises(
        UserError, match=f"holds {rows} rows of features; expected two images or more"
    ):
        save(rows)


def test_other_packings_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", npy((100,), bytes(100)))
    with pytest.raises(UserError, match="compressed by method 12"):
        open_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_never_raise_anything_but_a_user_error(tmp_path, save, count):
    save(tmp_path / "i.npz", images=ARRAYS["images"])
    refused = fuzz(open_npz, (tmp_path / "i.npz").read_bytes(), tmp_path / "x.npz", count)
    meta = np.array('{"n": 5, "features": "classifier", "image_shape": [8, 8, 1]}')
    save(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2), meta=meta)
    refused += fuzz(load_reference, (tmp_path / "r.npz").read_bytes(), tmp_path / "x.npz", count)
    assert refused > count


META = {
    "true": ('{"n": true}', "n = True; expected int"),
    "none": ('{"n": 1}', "is of 1 images and holds no features; expected two images or more"),
    "below 0": ('{"n": -4}', "is of -4 images"),
    "null": ('{"n": null}', "n = None; expected int"),
    "no object": ("[1]", "not a JSON object"),
    "no JSON": ("{", "not valid JSON"),
    "number": ('{"features": 5}', "features = 5; expected str"),
    "shape": ('{"image_shape": ["a", 1, 1]}', "no valid image_shape"),
    "recipe": ('{"recipe": []}', "recipe = a list; expected dict|recipe = .*; expected dict"),
}


@pytest.mark.parametrize("case", META)
def test_descriptions_that_do_not_fit_are_one_sentence(tmp_path, case):
    text, says = META[case]
    np.savez(tmp_path / "r.npz", mu=np.zeros(2), sigma=np.eye(2), meta=np.array(text))
    with pytest.raises(UserError, match=says):
        load_reference(tmp_path / "r.npz")
