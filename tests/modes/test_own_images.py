"""One's own images, from the folder to samples of a class by its name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser
from lora_diffusion_jax.modes import evaluate
from lora_diffusion_jax.modes.likelihood import heldout_images
from lora_diffusion_jax.modes.train import check_disk
from tests.modes.running import TINY, run
from tests.small import small_config

OPEN_SIZES = ["--config.data.name=", "--config.data.image_size=0", "--config.data.channels=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Transparent gray images of two classes below an outer folder."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(16):
        path = folder / "mine" / ("cat" if i % 2 else "ant 10") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 2), np.uint8), "LA").save(path)
    return folder


@pytest.mark.slow
def test_own_classes_are_trained_kept_and_sampled_by_name(pictures, tmp_path):
    own = [*TINY, *OPEN_SIZES, f"--config.data.path={pictures}", "--config.data.class_folders=True"]
    own += ["--config.data.num_classes=0", "--config.train.total_images=32"]
    where = f"--workdir={tmp_path / 'run'}"
    said = run("--mode=train", *own, where, status=2)
    assert "has transparent pixels" in said
    assert "data.background=white" in said
    run("--mode=train", *own, "--config.data.background=white", where)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert saved["class_names"] == ["ant 10", "cat"]
    assert (saved["channels"], saved["num_classes"]) == (1, 2)
    out = tmp_path / "cats.npz"
    said = run("--mode=sample", where, "--seeds=0-3", "--class_id=cat", f"--out={out}")
    assert "class 1 cat" in said
    assert np.load(out)["labels"].tolist() == [1] * 4
    said = run("--mode=sample", where, "--seeds=0-3", "--class_id=dog", f"--out={out}", status=2)
    assert "0 ant 10, 1 cat" in said


def test_likelihoods_take_the_labels_of_class_folders(pictures):
    config = small_config(class_conditional=True, data__num_classes=2)
    config.data.eval_path, config.data.background = str(pictures), "white"
    config.data.class_folders, config.data.class_names = True, ("ant 10", "cat")
    assert heldout_images(config).class_names == ("ant 10", "cat")
    config.data.class_names = ("cat", "ant 10")
    with pytest.raises(
        UserError, match="has the classes ant 10, cat, and .* on cat, ant 10; name and"
    ):
        heldout_images(config)
    config.class_conditional = False  # whose labels may differ or be missing
    assert heldout_images(config).num_classes == 0


def test_the_evaluation_knows_class_folders_and_backgrounds(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    opened = []

    def refuse(source, *rest):  # what follows is tested elsewhere
        opened.append(source)
        raise UserError("enough")

    monkeypatch.setattr(evaluate, "detector_for_source", refuse)
    command = ["ref", f"--data={pictures}", f"--dest={tmp_path / 'r.npz'}", "--class_folders"]
    said = run(*command, "--background=white", status=2, program=evaluate.main)
    assert "enough" in said
    assert opened[0].class_names == ("ant 10", "cat")
    assert "Set their background: --background=white" in run(
        *command, status=2, program=evaluate.main
    )


def test_a_disk_too_small_for_the_checkpoints_is_an_error_at_the_start(tmp_path, monkeypatch):
    config = small_config(train__total_images=100, train__checkpoint_every=10, train__keep=2)
    denoiser = build_denoiser(config)
    free = [2**40]
    usage = shutil.disk_usage(tmp_path)._replace
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=free[0]))
    check_disk(config, denoiser, tmp_path)
    free[0] = 1000
    with pytest.raises(UserError, match=r"need .* GiB more .* train.keep=2.* or keep fewer"):
        check_disk(config, denoiser, tmp_path)
    finished = small_config(train__total_images=0)
    check_disk(finished, denoiser, tmp_path)
