import io
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lora_diffusion_jax.data import digits
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    digits.prepare(path)
    return path


def png(array, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "PNG")
    file.seek(0)
    return file


def prepare(data_dir, features, examples, **info):
    """Prepares a TFDS data set 'tiny' of these examples, as another project would."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("0.1.0")
        name = "tiny"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
                **info,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


RED = np.full((4, 5, 3), (200, 10, 10), np.uint8)


def test_a_copy_elsewhere_is_the_same_data_set(data_dir, tmp_path):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    here = open_source("digits", str(data_dir))
    there = open_source("digits:1.0.0", str(tmp_path))  # by version: nothing is prepared
    test = open_source("digits", str(data_dir), split="test")
    assert here.fingerprint() == there.fingerprint() != test.fingerprint()
    np.testing.assert_array_equal(here[7]["image"], there[7]["image"])


def test_slices_of_splits(data_dir):
    whole = open_source("digits", str(data_dir))
    tail = open_source("digits", str(data_dir), split="train[-100:]")
    assert len(tail) == 100
    np.testing.assert_array_equal(tail[0]["image"], whole[1400]["image"])


def test_pickled_source_reads_the_same(data_dir):
    source = open_source("digits", str(data_dir), split="test")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(range(297))["image"], source.read(range(297))["image"])
    np.testing.assert_array_equal(copy.labels(), source.labels())


def test_summary(data_dir):
    lines = summarize(open_source("digits", str(data_dir), split="test")).splitlines()
    assert "split test" in lines[0]
    assert "297 of 8x8 gray" in lines[1]
    assert "decoded 18.6 KiB" in lines[3]
    counts = [int(line.split(": ")[1]) for line in lines if line.startswith("  class")]
    assert (len(counts), sum(counts)) == (10, 297)


def test_data_set_without_labels_and_with_other_features(tmp_path):
    prepare(
        tmp_path,
        {
            "image": tfds.features.Image(shape=(4, 5, 3)),
            "id": tfds.features.Text(),
            "mask": tfds.features.Image(shape=(4, 5, 1)),
        },
        [{"image": png(RED + i), "id": str(i), "mask": png(RED, "L")} for i in range(3)],
    )
    source = open_source("tiny", str(tmp_path))
    assert source.num_classes == 0
    assert source.image_shape == (4, 5, 3)
    np.testing.assert_array_equal(source[2]["image"], RED + 2)
    assert source[2]["label"] == 0


def test_supervised_keys_choose_among_labels(tmp_path):
    label = tfds.features.ClassLabel
    prepare(
        tmp_path,
        {
            "picture": tfds.features.Image(shape=(4, 5, 3)),
            "label": label(num_classes=2),
            "kind": label(names=["a", "b", "c"]),
        },
        [{"picture": png(RED), "label": 1, "kind": "c"}],
        supervised_keys=("picture", "kind"),
    )
    source = open_source("tiny", str(tmp_path))
    assert source[0]["label"] == 2
    assert source.class_names == ("a", "b", "c")


def test_gray_image_in_a_colour_data_set_becomes_colour(tmp_path):
    prepare(
        tmp_path,
        {"image": tfds.features.Image(shape=(4, 5, 3))},
        [{"image": png(RED)}, {"image": png(np.full((4, 5), 77, np.uint8), "L")}],
    )
    source = open_source("tiny", str(tmp_path))
    np.testing.assert_array_equal(source[1]["image"], np.full((4, 5, 3), 77))


def test_undeclared_size_is_taken_from_the_images(tmp_path):
    prepare(
        tmp_path,
        {"image": tfds.features.Image(shape=(None, None, 3))},
        [{"image": png(RED)}, {"image": png(RED)}],
    )
    assert open_source("tiny", str(tmp_path)).image_shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("features", "example", "message"),
    [
        (
            {"image": tfds.features.Image(shape=(None, None, 3))},
            {"image": png(RED[:3])},
            r"image 1 of TFDS tiny/0\.1\.0.* is 3x5 colour, but image 0 .* is 4x5 colour\. .*data\.path",
        ),
        (
            {"image": tfds.features.Image(shape=(4, 5, 4))},
            {"image": png(RED, "RGBA")},
            "have 4 channels",
        ),
        ({"id": tfds.features.Text()}, {"id": "x"}, "has 0 image features; .* features are id"),
    ],
)
def test_data_sets_that_do_not_fit(tmp_path, features, example, message):
    first = {
        key: png(RED, "RGBA" if features["image"].shape[2] == 4 else "RGB")
        if key == "image"
        else "x"
        for key in features
    }
    prepare(tmp_path, features, [first, example])
    with pytest.raises(UserError, match=message):
        open_source("tiny", str(tmp_path))


def test_split_without_labels_is_refused_when_read(tmp_path):
    prepare(
        tmp_path,
        {
            "image": tfds.features.Image(shape=(4, 5, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        },
        [{"image": png(RED), "label": -1}],
    )
    source = open_source("tiny", str(tmp_path))
    with pytest.raises(UserError, match="image 0 of .* has label -1; .* classes are 0 to 1"):
        source[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "mnist"},
            r"'mnist' is not prepared in .* \(found: digits\).*data\.data_dir(.|\n)*"
            r"pip install tensorflow(.|\n)*builder\('mnist', data_dir='.*"
            r"file_format='array_record'\)\.download_and_prepare",
        ),
        ({"name": "digits:9.9.9"}, r"found: 1\.0\.0"),
        (
            {"name": "digits", "split": "val"},
            r"'val'.*\['test', 'train'\]|'val'.*\['train', 'test'\]",
        ),
        (
            {"name": "digits", "split": "train[:0]"},
            "holds no images; its splits are .*train \\(1,500\\)",
        ),
        ({"name": "digits", "split": "train[9999:]"}, "9999"),
        ({"name": "digits", "split": "[["}, "split"),
        ({"name": "../x"}, "is not a TFDS name"),
        ({}, "found neither"),
        ({"name": "digits", "path": "x"}, "data.name='digits' and data.path='x'"),
        ({"path": "x", "split": "test"}, "no split 'test', only 'train'"),
        ({"name": "digits", "class_folders": True}, "class_folders needs data.path"),
    ],
)
def test_requests_that_cannot_be_served(data_dir, arguments, message):
    with pytest.raises(UserError, match=message):
        open_source(**{"data_dir": str(data_dir), **arguments})


def test_missing_directory_and_configurations(tmp_path):
    with pytest.raises(UserError, match="found: no such folder"):
        open_source("cifar10", str(tmp_path / "none"))
    for config in ("32x32", "64x64"):
        (tmp_path / "resized" / config / "0.1.0").mkdir(parents=True)
    with pytest.raises(UserError, match="resized/32x32, resized/64x64"):
        open_source("resized", str(tmp_path))
    with pytest.raises(UserError, match="not a complete prepared TFDS data set"):
        open_source("resized/32x32", str(tmp_path))


def test_newest_version_is_read(data_dir, tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        shutil.copytree(data_dir / "digits" / "1.0.0", tmp_path / "copy" / version)
    assert "copy/1.10.0" in open_source("copy", str(tmp_path)).title


def damage(directory, what):
    train = next(directory.glob("*-train.array_record*"))
    if what == "missing":
        train.unlink()
    elif what == "truncated":
        train.write_bytes(train.read_bytes()[: train.stat().st_size // 2])
    elif what == "overwritten":
        train.write_bytes(bytes(train.stat().st_size))
    elif what == "tfrecord":
        info = directory / "dataset_info.json"
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    else:
        (directory / what).write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "array_record.* is missing: digits/1.0.0 is incomplete"),
        ("truncated", "cannot read TFDS digits.*damaged or incomplete: prepare"),
        ("overwritten", "cannot read TFDS digits.*damaged or incomplete: prepare"),
        (
            "tfrecord",
            r"digits/1\.0\.0 as tfrecord, which has no random access.*expected array_record(.|\n)*'digits'",
        ),
        ("dataset_info.json", "not a complete prepared TFDS data set"),
        ("features.json", "not a complete prepared TFDS data set"),
    ],
)
def test_damaged_preparations(data_dir, tmp_path, what, message):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    damage(tmp_path / "digits" / "1.0.0", what)
    with pytest.raises(UserError, match=message):
        open_source("digits", str(tmp_path))
