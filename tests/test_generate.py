"""Images are functions of their seeds; files hold what they say."""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax import generate, outputs
from lora_diffusion_jax.diffusion.precond import EDM
from lora_diffusion_jax.diffusion.samplers import edm_sampler
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.sharding import make_mesh


def apply(variables, x, sigma, labels):
    """The ideal denoiser of points at the class's mean: 0.1 * class - 0.4 (or the variable)."""
    mean = variables["mean"] if labels is None else (labels @ (0.1 * np.arange(8)) - 0.4)
    return (0.01 * x + sigma**2 * np.float32(1) * mean.reshape(-1, 1, 1, 1)) / (0.01 + sigma**2)


IDEAL = types.SimpleNamespace(apply=apply, precond=EDM())


def make(batch_size=4, num_classes=8, **settings):
    def sampler(denoise, latents, *, key):
        return edm_sampler(denoise, latents, num_steps=6, key=key, **settings)

    return generate.Generator(IDEAL, sampler, (4, 4, 1), num_classes, make_mesh(), batch_size)


VARIABLES = {"mean": np.zeros(1, np.float32)}


def save(path, generator, seeds, about):
    labels = generator.choose_labels(np.asarray(seeds))
    path.parent.mkdir(parents=True, exist_ok=True)
    output = outputs.open_output(path, np.asarray(seeds), labels, (4, 4, 1), "some network")
    for batch in generator.batches(VARIABLES, seeds):
        output.write(batch)
    output.finish(about)


def images_of(generator, seeds, classes=None):
    labels = None if classes is None else generator.choose_labels(seeds, classes)
    batches = list(generator.batches(VARIABLES, seeds, labels))
    return generate.Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize("s_churn", [0.0, 30.0])
def test_image_depends_on_its_seed_alone(s_churn):
    """Not on the batch size, the place in the batch, or the padding of a short last one."""
    whole = images_of(make(4, s_churn=s_churn), range(10))
    for size, seeds in ((3, [7, 2, 9, 2]), (16, [9]), (1, [0, 7])):
        part = images_of(make(size, s_churn=s_churn), seeds)
        np.testing.assert_array_equal(part.seeds, seeds)
        np.testing.assert_array_equal(part.labels, whole.labels[seeds])
        # One unit: the compiler may round differently at another batch size.
        assert np.abs(part.images.astype(int) - whole.images[seeds]).max() <= 1
    assert np.ptp(whole.images.reshape(10, -1).mean(1)) > 5


def test_classes_follow_the_request_or_the_seed():
    generator = make()
    drawn = generator.choose_labels(np.arange(4000))
    counts = np.bincount(drawn, minlength=8)
    assert counts.min() > 400  # 500 each, standard deviation 21
    assert counts.max() < 600
    asked = images_of(generator, range(6), [0, 1, 2, 5, 6, 7])
    # The ideal denoiser of class c gives 0.1 c - 0.4 plus what the seed gives: 12.75 units per class.
    first = images_of(generator, range(6), 0)
    apart = (asked.images.astype(float) - first.images).reshape(6, -1).mean(1)
    np.testing.assert_allclose(apart, 12.75 * asked.labels, atol=1)
    np.testing.assert_array_equal(images_of(generator, range(3), 4).labels, 4)


def test_unconditional_images_have_no_label():
    assert (images_of(make(num_classes=0), range(3)).labels == generate.NO_LABEL).all()


@pytest.mark.parametrize(
    ("classes", "num_classes", "words"),
    [(8, 8, "Class 8 does not exist"), (-1, 8, "Class -1"), (0, 0, "unconditional")],
)
def test_impossible_classes_are_refused(classes, num_classes, words):
    with pytest.raises(UserError, match=words):
        images_of(make(num_classes=num_classes), [0], classes)


def test_seed_lists():
    assert generate.parse_seeds("0-3, 7,10-11") == [0, 1, 2, 3, 7, 10, 11]
    for text in ("", "3-1", "a", "1-", "-4", "1,,2", "0x10"):
        with pytest.raises(UserError, match="--seeds"):
            generate.parse_seeds(text)
    with pytest.raises(UserError, match="4294967296"):
        generate.check_seeds([2**32])
    with pytest.raises(UserError, match="No seeds"):
        generate.check_seeds([])


def test_files_hold_images_seeds_and_labels(tmp_path):
    generator, seeds = make(), [3, 11, 5]
    expected = images_of(generator, seeds)
    about = {"weights": "ema"}
    path = tmp_path / "new" / "samples.npz"
    save(path, generator, seeds, about)
    with np.load(path) as file:
        assert set(file) == {"images", "seeds", "labels", "about"}
        assert file["images"].dtype == np.uint8
        for name in ("images", "seeds", "labels"):
            np.testing.assert_array_equal(file[name], getattr(expected, name))
        assert json.loads(str(file["about"])) == about
    folder = tmp_path / "folder"
    save(folder, generator, seeds, about)
    with Image.open(folder / "000011.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected.images[1, ..., 0])
    listed = json.loads((folder / "dataset.json").read_text())["labels"]
    assert listed == [[f"{s:06d}.png", int(c)] for s, c in zip(seeds, expected.labels, strict=True)]
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"samples.npz", "000003.png", "000011.png", "000005.png", "dataset.json"}


@pytest.mark.parametrize("name", ["samples.npz", "grid.png", "folder"])
def test_what_was_made_before_a_kill_is_kept(tmp_path, name):
    """Of the same identity; a file cut short in the middle of an image is cut back."""
    generator, seeds = make(batch_size=2), np.array([4, 1, 9, 3, 7])
    expected = images_of(generator, seeds)
    path, whole = tmp_path / name, tmp_path / f"whole_{name}"
    save(whole, generator, seeds, {})
    first = outputs.open_output(path, seeds, expected.labels, (4, 4, 1), "one")
    assert not first.done.any()
    first.write(generate.Batch(*(rows[:2] for rows in expected)))
    if name != "folder":
        with first.images.open("ab") as file:
            file.write(b"half")
    again = outputs.open_output(path, seeds, expected.labels, (4, 4, 1), "one")
    np.testing.assert_array_equal(again.done, [True, True, False, False, False])
    again.write(generate.Batch(*(rows[2:] for rows in expected)))
    again.finish({})
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        assert file.read_bytes() == (whole if path.is_file() else whole / file.name).read_bytes()
    other = outputs.open_output(path, seeds, expected.labels, (4, 4, 1), "another")
    assert not other.done.any()


def test_an_earlier_result_does_not_pass_for_this_one(tmp_path):
    generator, seeds = make(), np.array([1, 2])
    save(tmp_path, generator, seeds, {})
    labels = generator.choose_labels(seeds)
    output = outputs.open_output(tmp_path, seeds, labels, (4, 4, 1), "another network")
    assert not output.done.any()
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_two_processes_do_not_write_one_output(tmp_path, name):
    labels = np.zeros(1, np.int32)
    held = outputs.open_output(tmp_path / name, np.array([1]), labels, (4, 4, 1), "x")
    program = f"""
import numpy as np
from pathlib import Path
from lora_diffusion_jax import outputs
outputs.open_output(Path({str(tmp_path / name)!r}), np.array([1]), np.zeros(1), (4, 4, 1), "x")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError: Another process is writing" in done.stderr
    assert not held.lock.closed


def test_grid_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    picture = outputs.grid(images, columns=3, least_side=4, gap=1)
    assert picture.shape == (1 + 2 * 5, 1 + 3 * 7, 1)
    assert (picture[1:5, 8:14] == 1).all()
    assert (picture[6:10, 1:7] == 3).all()
    assert (picture[6:10, 15:21] == 96).all()  # the sixth place is empty


def test_sampler_is_compiled_once():
    """Sample grids during training come from one generator."""
    generator = make()
    images_of(generator, range(6))
    images_of(generator, range(2))
    assert generator.compiled._cache_size() == 1


@pytest.mark.parametrize("text", ["0-99999999999", "4294967296", "0-4294967295"])
def test_seeds_are_bounded_before_they_are_listed(text):
    with pytest.raises(UserError, match="--seeds="):
        generate.parse_seeds(text)


def test_numbers_beyond_any_integer_are_plain_errors():
    with pytest.raises(UserError, match="must lie in"):
        generate.check_seeds([0, 10**30])
    with pytest.raises(UserError, match=f"Class {10**30} does not exist"):
        images_of(make(), [0], 10**30)


_ON_MANY = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from tests.test_generate import images_of, make
import jax
assert len(jax.devices()) == 8
np.save(sys.argv[1], images_of(make(8, s_churn=30.0), range(10)).images)
"""


def test_image_does_not_depend_on_the_number_of_devices(tmp_path):
    path, root = tmp_path / "images.npy", os.getcwd()
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", _ON_MANY, str(path), root],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=root,
    )
    assert len(jax.devices()) == 1
    here = images_of(make(8, s_churn=30.0), range(10)).images
    assert np.abs(np.load(path).astype(int) - here).max() <= 1
