import multiprocessing
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    digits.prepare(path)
    return path


def pixel_counts(images):
    """A multiset of images, whatever their order."""
    return sorted(image.tobytes() for image in images)


def test_both_splits_together_are_scikit_learns_digits(data_dir):
    images, labels = load_digits(return_X_y=True)
    parts = [open_source("digits", str(data_dir), split=split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1500, 297]
    found = [part.read(range(len(part))) for part in parts]
    pairs = np.concatenate(
        [
            np.concatenate([part["image"].reshape(-1, 64), part["label"][:, None]], 1)
            for part in found
        ]
    )
    # 0..16 to 0..255; 16 steps of 15.9375, so rounding back is exact
    unscaled = np.round(pairs[:, :64] * (16 / 255))
    np.testing.assert_allclose(unscaled * 255 / 16, pairs[:, :64], atol=0.5)
    assert pixel_counts(
        np.concatenate([unscaled, pairs[:, 64:]], 1).astype(np.uint8)
    ) == pixel_counts(np.concatenate([images, labels[:, None]], 1).astype(np.uint8))
    assert parts[0].image_shape == (8, 8, 1)
    assert parts[0].class_names == tuple("0123456789")


def test_split_is_stratified_even_and_fixed():
    labels = load_digits(return_X_y=True)[1]
    train, test = digits.split_indices(labels)
    assert (len(train), len(test)) == (1500, 297)
    assert sorted([*train, *test]) == list(range(1797))
    shares = np.bincount(labels[test]) - np.bincount(labels) * 297 / 1797
    assert np.abs(shares).max() < 1
    for digit in range(10):  # evenly spread: gaps of 6 or 7 of a class's members
        member = np.flatnonzero(np.isin(np.flatnonzero(labels == digit), test))
        assert set(np.diff(member)) <= {5, 6, 7}
    np.testing.assert_array_equal(test[:5], digits.split_indices(labels)[1][:5])


def test_tfds_knows_the_builder_by_name_and_reads_it_itself(data_dir):
    builder = tfds.builder("digits", data_dir=data_dir, file_format="array_record")
    source = builder.as_data_source(split="test")  # TFDS's own decoding, independent of ours
    ours = open_source("digits", str(data_dir), split="test")
    for i in (0, 100, 296):
        np.testing.assert_array_equal(source[i]["image"], ours[i]["image"])
        assert source[i]["label"] == ours[i]["label"]


def test_no_tensorflow_and_no_output(tmp_path):
    code = (
        "import sys\n"
        "from lora_diffusion_jax.data.sources import open_source\n"
        f"open_source('digits', {str(tmp_path)!r})[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_two_processes_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")  # both start from nothing at the same time
    with context.Pool(2) as pool:
        paths = pool.map(digits.prepare, [tmp_path, tmp_path], chunksize=1)
    assert paths[0] == paths[1]
    assert len(open_source("digits", str(tmp_path))) == 1500
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # no scratch left


def test_second_arrival_keeps_what_the_first_prepared(tmp_path, monkeypatch):
    first = {}

    def prepare_late(directory, prepare_into=digits._prepare_into):
        prepare_into(directory)
        if not first:  # another process finishes between our check and our rename
            first["now"] = True
            digits.prepare(tmp_path)
            first["inode"] = (tmp_path / "digits" / "1.0.0").stat().st_ino

    monkeypatch.setattr(digits, "_prepare_into", prepare_late)
    assert digits.prepare(tmp_path).stat().st_ino == first["inode"]


def test_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(directory):
        digits.Path(directory, "digits").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_prepare_into", fail)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Cannot use .*file.* data.data_dir"):
        open_source("digits", str(tmp_path / "file"))


def test_environment_variable_names_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    open_source("digits")
    assert (tmp_path / "digits" / "1.0.0" / "features.json").is_file()
    monkeypatch.chdir(tmp_path)
    for wrong, says in (("$NOPE/tf", "variable NOPE is not set"), ("gs://b/tf", "is a URL")):
        monkeypatch.setenv("TFDS_DATA_DIR", wrong)
        with pytest.raises(UserError, match=rf"^TFDS_DATA_DIR={re.escape(wrong)}.*{says}"):
            open_source("digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
