"""Data sets of Hugging Face: Parquet files as another project's pyarrow writes them."""

import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lora_diffusion_jax.data.pipeline import Batches
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.data import complete, open_heldout
from tests.modes.running import TINY
from tests.small import ROOT, config_flags, small_config

datasets = pytest.importorskip("datasets")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 8, 8, 3), np.uint8)
LABELS = np.arange(30) % 3
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The cache of `datasets`, and no network."""
    folder = tmp_path_factory.getbasetemp() / "hf"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder


def png(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def encoded(images=IMAGES):
    return [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(images)]


def described(**features):
    """Arrow's metadata, as `datasets` writes them, for columns of known types."""
    return {"huggingface": json.dumps({"info": {"features": features}})}


IMAGE = {"_type": "Image"}
CLASS = {"names": NAMES, "_type": "ClassLabel"}


def write(folder, columns, metadata=None, name="train-00000-of-00001.parquet", rows=slice(None)):
    table = pyarrow.table({key: list(values)[rows] for key, values in columns.items()})
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images for training, in two files, and 6 for tests."""
    path = tmp_path_factory.mktemp("parquet")
    columns = {"id": range(30), "img": encoded(), "kind": LABELS.tolist()}
    metadata = described(id={"dtype": "int64", "_type": "Value"}, img=IMAGE, kind=CLASS)
    for name, rows in (
        ("train-00000-of-00002.parquet", slice(0, 10)),
        ("train-00001-of-00002.parquet", slice(10, 24)),
        ("test-00000-of-00001.parquet", slice(24, 30)),
    ):
        write(path, columns, metadata, name, rows)
    return str(path)


def test_images_classes_and_splits_are_found_by_their_types(folder):
    source = open_source("hf", folder)
    assert (len(source), source.image_shape, source.num_classes) == (24, (8, 8, 3), 3)
    assert source.class_names == ("ant", "bee", "cat")
    batch = source.read([23, 0, 11])  # in any order
    np.testing.assert_array_equal(batch["image"], IMAGES[[23, 0, 11]])
    np.testing.assert_array_equal(batch["label"], LABELS[[23, 0, 11]])
    np.testing.assert_array_equal(source.labels(), LABELS[:24])
    assert source.bytes_on_disk == sum(len(row["bytes"]) for row in encoded()[:24])
    test = open_source("hf", folder, split="test")
    np.testing.assert_array_equal(test.read(range(6))["image"], IMAGES[24:])
    part = open_source("hf", folder, split="train[-25%:]+test[:1]")
    np.testing.assert_array_equal(part.read(range(7))["image"], IMAGES[18:25])
    np.testing.assert_array_equal(part.labels(), LABELS[18:25])


def test_a_config_gets_names_sizes_and_held_out_images(folder):
    config = small_config(
        class_conditional=True, data__name="hf", data__data_dir=folder, data__channels=0
    )
    done = complete(config, open_source("hf", folder))
    assert done.data.class_names == ("ant", "bee", "cat")
    assert done.data.channels == 3
    assert len(open_heldout(config)) == 6
    config.data.eval_split = "validation"
    with pytest.raises(UserError, match=r"no split 'validation': its splits are .*train \(24\)"):
        open_heldout(config)


def test_a_copy_elsewhere_is_the_same_data_set_and_an_edit_is_not(folder, tmp_path):
    columns = {"img": encoded(), "kind": LABELS.tolist()}
    source = open_source("hf", folder)
    one = write(tmp_path / "a", columns, described(img=IMAGE, kind=CLASS), rows=slice(0, 24))
    assert open_source("hf", one).fingerprint() == source.fingerprint()
    columns["kind"][3] = 2
    other = write(tmp_path / "b", columns, described(img=IMAGE, kind=CLASS), rows=slice(0, 24))
    assert open_source("hf", other).fingerprint() != source.fingerprint()


def test_batches_go_on_where_they_stopped_from_a_pickled_source(folder):
    whole = Batches(open_source("hf", folder), 10, seed=3, memory_limit=0)
    copy = pickle.loads(pickle.dumps(open_source("hf", folder)))
    again = Batches(copy, 10, seed=3, memory_limit=0).iterate(start_step=4)
    for step in (4, 5, 6):
        batch = next(again)
        for key, value in whole[step].items():
            np.testing.assert_array_equal(batch[key], value)
    again.close()


PLAIN = {"image": encoded(), "label": LABELS.tolist()}


@pytest.mark.parametrize(
    ("columns", "keys", "names"),
    [
        (PLAIN, {}, ("0", "1", "2")),  # no metadata: bytes, and whole numbers named `label`
        ({"png": [row["bytes"] for row in encoded()]}, {}, ()),
        ({**PLAIN, "label": [NAMES[k] for k in LABELS]}, {}, ()),
        ({**PLAIN, "label": [NAMES[k] for k in LABELS]}, {"label_key": "label"}, tuple(NAMES)),
        (
            {**PLAIN, "small": encoded(IMAGES[:, :4])},
            {"image_key": "image", "label_key": "label"},
            ("0", "1", "2"),
        ),
    ],
)
def test_plain_columns(tmp_path, columns, keys, names):
    source = open_source("hf", write(tmp_path / "a", columns), **keys)
    assert source.class_names == names
    np.testing.assert_array_equal(source.read([4])["image"], IMAGES[[4]])
    np.testing.assert_array_equal(source.labels(), LABELS if names else np.zeros(30))


def test_what_save_to_disk_wrote(folder, tmp_path):
    loaded = datasets.load_dataset(folder)
    loaded.save_to_disk(tmp_path / "both")
    loaded["test"].save_to_disk(tmp_path / "one")
    both = open_source("hf", str(tmp_path / "both"), split="test")
    one = open_source("hf", str(tmp_path / "one"), split="test")
    np.testing.assert_array_equal(both.read(range(6))["image"], IMAGES[24:])
    assert both.fingerprint() == one.fingerprint()


TWO = described(image=IMAGE, label=CLASS, small=IMAGE)
CHOICE = described(image=IMAGE, coarse=CLASS, fine=CLASS)


@pytest.mark.parametrize(
    ("columns", "metadata", "keys", "words"),
    [
        ({**PLAIN, "small": encoded()}, TWO, {}, "2 columns of images .image, small.*image_key"),
        ({"label": [0]}, None, {}, "0 columns of images"),
        (PLAIN, None, {"image_key": "label"}, "'label' is no column of images"),
        (PLAIN, None, {"label_key": "image"}, "'image' is no column of labels"),
        ({"image": encoded() + [{"bytes": None, "path": "/etc/passwd"}]}, None, {}, "expected the bytes"),
        ({"image": [{"bytes": png(IMAGES[0], "GIF"), "path": ""}]}, None, {}, "image 0 of .* PNG or JPEG"),
        ({"image": encoded() + encoded(IMAGES[:, :4])}, None, {}, "image 30 of .* is 4x8"),
        (PLAIN, None, {"split": "train[:0]"}, "holds no images"),
        (PLAIN, None, {"split": "train["}, "no split"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, columns, metadata, keys, words):
    path = write(tmp_path / "a", columns, metadata)
    with pytest.raises(UserError, match=words):
        open_source("hf", path, **keys)


def test_ambiguous_labels_are_an_error_where_classes_count(tmp_path):
    columns = {"image": encoded(), "coarse": LABELS.tolist(), "fine": LABELS.tolist()}
    path = write(tmp_path / "a", columns, CHOICE)
    config = small_config(class_conditional=True, data__channels=3)
    with pytest.raises(UserError, match="labels, coarse, fine: choose with data.label_key"):
        complete(config, open_source("hf", path))
    assert complete(config, open_source("hf", path, label_key="fine")).data.num_classes == 3
    config.class_conditional = False
    complete(config, open_source("hf", path))


def test_labels_that_are_missing_are_named(tmp_path):
    metadata = described(image=IMAGE, label=CLASS)
    path = write(tmp_path / "a", {**PLAIN, "label": [0, 1, -1, *LABELS[3:].tolist()]}, metadata)
    source = open_source("hf", path)
    for read in (source.labels, lambda: source.read([2])):
        with pytest.raises(UserError, match="image 2 of .* has label -1"):
            read()


@pytest.mark.parametrize(
    ("name", "data_dir", "words"),
    [
        ("hf", "", "needs data.data_dir"),
        ("hf", "/nowhere", "is not a folder"),
        ("hf:", "", "names no data set"),
        ("hf:a/b", "/tmp", "with data.data_dir=/tmp names no data set"),
        (
            "hf:parquet",
            "",
            "names no data set",
        ),  # a format to `datasets`, of the files that are here
        ("hf:./here", "", "names no data set"),
        ("hf:nobody/nothing", "", "hf:nobody/nothing"),  # offline
    ],
)
def test_names_of_no_data_set(name, data_dir, words):
    with pytest.raises(UserError, match=words):
        open_source(name, data_dir)


@pytest.mark.parametrize("name", ["parquet", "csv", "imagefolder"])
def test_a_folder_may_be_called_like_a_format(tmp_path, monkeypatch, name):
    write(tmp_path / name, {"image": encoded(IMAGES[:4])}, described(image=IMAGE))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(open_source("hf", name).read(range(4))["image"], IMAGES[:4])


def test_a_folder_here_is_not_mistaken_for_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "owner" / "name", {"image": encoded(IMAGES[:4])}, described(image=IMAGE))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is also a folder owner/name here"):
        open_source("hf:owner/name", "")


def test_other_kinds_of_files_are_refused_and_nothing_in_them_is_run(tmp_path):
    (tmp_path / "a.py").write_text("raise SystemExit('run')")
    (tmp_path / "train.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="of the kind 'json'"):
        open_source("hf", str(tmp_path))
    (tmp_path / "train.json").unlink()
    with pytest.raises(
        UserError, match="cannot be opened as a data set .No .supported. data files"
    ):
        open_source("hf", str(tmp_path))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"package datasets, .* pip install .*hf-datasets"):
        open_source("hf", "/x")


TRAIN = """
import sys
from lora_diffusion_jax.modes.main import main
assert main(sys.argv[1:]) == 0
assert "datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_training_imports_no_tensorflow(folder, tmp_path):
    """In a process where importing it would fail."""
    package = tmp_path / "path" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('TensorFlow was imported')")
    described = tmp_path / "path" / "tensorflow-2.20.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Name: tensorflow\nVersion: 2.20.0\n")
    flags = config_flags(
        data__name="hf",
        data__data_dir=folder,
        data__channels=0,
        data__num_classes=0,
        class_conditional=True,
        train__total_images=16,
        eval__num_samples=0,
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "--mode=train", *TINY, *flags, f"--workdir={tmp_path / 'run'}"],
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["class_names"] == ["ant", "bee", "cat"]
