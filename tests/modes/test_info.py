"""--mode=info where there is something wrong with the data."""

import numpy as np
import pytest
from PIL import Image

from tests.modes.running import run

CONFIG = ("--mode=info", "--config=configs/digits.py")
FOLDER = (*CONFIG, "--config.data.name=", "--config.class_conditional=False")
SIZES = ("--config.data.image_size=8", "--config.data.channels=1")


@pytest.fixture
def images(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["path=/nope"], "/nope does not exist"),
        (["path=gs://a/b"], "is a URL"),
        (["path=$NOPE/x"], "variable NOPE is not set"),
        (["path=IMAGES", "image_size=16"], "data.image_size=16, but"),
        (["path=IMAGES", "class_folders=True"], "has no label"),
    ],
)
def test_a_mistake_in_data_that_were_given_is_an_error(images, arguments, says):
    overrides = [f"--config.data.{a.replace('IMAGES', str(images))}" for a in arguments]
    text = run(*FOLDER, *SIZES, *overrides, status=2)
    assert text.startswith("error: ")
    assert says in text


def test_what_a_config_names_may_be_elsewhere(images, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(images))
    text = run("--mode=info", "--config=configs/cifar10_edm.py", "--measure=off")
    assert "data set: not opened. 'cifar10' is not prepared" in text
    assert "Total parameters" in text
    text = run("--mode=info", "--config=cifar10_edm", "--config.data.name=cifar11", status=2)
    assert "error: 'cifar11' is not prepared" in text
