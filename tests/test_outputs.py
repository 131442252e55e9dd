"""Outputs hold the images of their seeds, survive interruptions, and are written by one process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.outputs import Output, grid, row_titles, write_png

SEEDS = np.array([4, 1, 9, 3, 11])
LABELS = np.array([0, 7, 2, 2, 5], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
ABOUT = {"weights": "ema"}


def save(path, identity="one", *, overwrite=False):
    output = Output(path, SEEDS, LABELS, identity, overwrite=overwrite)
    output.write(IMAGES)
    output.finish(ABOUT)


def contents(path):
    paths = [path] if path.is_file() else sorted(path.iterdir())
    return {p.name: p.read_bytes() for p in paths}


def test_a_file_holds_images_seeds_and_labels(tmp_path):
    path = tmp_path / "new" / "samples.npz"
    save(path)
    with np.load(path) as file:
        assert set(file) == {"images", "seeds", "labels", "about"}
        assert file["images"].dtype == np.uint8
        for name, expected in (("images", IMAGES), ("seeds", SEEDS), ("labels", LABELS)):
            np.testing.assert_array_equal(file[name], expected)
        assert json.loads(str(file["about"])) == ABOUT
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_holds_one_picture_per_seed(tmp_path):
    save(tmp_path)
    with Image.open(tmp_path / "000011.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), IMAGES[4, ..., 0])
    listed = json.loads((tmp_path / "dataset.json").read_text())["labels"]
    assert listed == [[f"{s:06d}.png", int(c)] for s, c in zip(SEEDS, LABELS, strict=True)]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("name", ["samples.npz", "grid.png", "folder"])
def test_what_was_done_before_a_kill_is_kept(tmp_path, name):
    """If the run is the same."""
    path = tmp_path / name
    whole = path.with_name(f"whole_{name}")
    save(whole)
    first = Output(path, SEEDS, LABELS, "one")
    assert not first.done.any()
    first.write(IMAGES[:2])
    again = Output(path, SEEDS, LABELS, "one")
    np.testing.assert_array_equal(again.done, [True, True, False, False, False])
    again.write(IMAGES[2:])
    again.finish(ABOUT)
    found, expected = contents(path), contents(whole)
    assert list(found.values()) == list(expected.values())
    assert not Output(path, SEEDS, LABELS, "another").done.any()


def test_images_that_would_be_counted_with_the_new_ones_are_refused(tmp_path):
    """Of an earlier, larger run: --overwrite removes them; anybody else's are never removed."""
    save(tmp_path)
    few = SEEDS[:2], LABELS[:2]
    with pytest.raises(UserError, match=r"3 images .* such as 000003.png.*--overwrite"):
        Output(tmp_path, *few, "few")
    assert len(list(tmp_path.glob("*.png"))) == 5
    output = Output(tmp_path, *few, "few", overwrite=True)
    output.write(IMAGES[:2])
    output.finish(ABOUT)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["000001.png", "000004.png"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "holiday.JPG").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holiday.JPG.*choose another --out\.$"):
            Output(tmp_path, *few, "few", overwrite=overwrite)
    assert (tmp_path / "deep" / "holiday.JPG").read_bytes() == b"precious"
    Output(tmp_path / "deep" / "x.npz", *few, "few")  # a file holds its own images alone


@pytest.mark.parametrize("name", ["000004.png", "dataset.json"])
@pytest.mark.parametrize("text", ["precious", '{"labels": null}', "{}", "[" * 10**5])
def test_files_that_no_earlier_command_wrote_are_replaced_only_if_asked(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"1 files .* such as {name}: choose .* --overwrite"):
        save(tmp_path)
    assert (tmp_path / name).read_text() == text
    assert {p.name for p in tmp_path.iterdir()} <= {name, ".lock"}
    save(tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("*.png"))) == len(SEEDS)
    save(tmp_path, "another")  # these are an earlier command's


def test_images_count_by_content_as_in_an_evaluation(tmp_path):
    stranger = tmp_path / "elsewhere" / "old"
    write_png(stranger, IMAGES[0])
    for n, place in enumerate(["portrait", "old.jfif", "deep/x.dat", "linked/old"]):
        out = tmp_path / str(n)
        (out / place).parent.mkdir(parents=True)
        if place.startswith("linked"):
            (out / "linked").rmdir()
            (out / "linked").symlink_to(stranger.parent)
            (stranger.parent / "back").symlink_to(stranger.parent)
        else:
            (out / place).write_bytes(stranger.read_bytes())
        (out / ".000001.png.0123abcd.tmp").write_bytes(stranger.read_bytes())  # of a kill
        with pytest.raises(UserError, match=f"1 images .* such as {Path(place).name};"):
            save(out)
        (out / place).unlink()
        save(out)


@pytest.mark.parametrize("name", [".lock", ".unfinished", "000004.png", "dataset.json"])
def test_links_in_the_folder_are_not_followed(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    if name == ".lock":
        with pytest.raises(UserError, match=".lock is a link"):
            save(tmp_path / "out")
    else:
        save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "x.npz.unfinished").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="x.npz.unfinished is a link"):
        save(tmp_path / "x.npz")


def test_an_earlier_result_does_not_pass_for_this_one(tmp_path):
    save(tmp_path)
    assert not Output(tmp_path, SEEDS, LABELS, "another").done.any()
    assert not list(tmp_path.glob("*.png"))
    assert not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_two_processes_do_not_write_one_output(tmp_path, name):
    held = Output(tmp_path / name, SEEDS, LABELS, "one")
    program = f"""
import numpy as np
from pathlib import Path
from lora_diffusion_jax.outputs import Output
Output(Path({str(tmp_path / name)!r}), np.array([1]), np.zeros(1, np.int32), "one")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "TakenError: Another process is writing" in done.stderr
    held.write(IMAGES)
    held.finish(ABOUT)


def test_grid_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    picture = grid(images, columns=3, min_side=4, gap=1)
    assert picture.shape == (1 + 2 * 5, 1 + 3 * 7, 1)
    assert (picture[1:5, 8:14] == 1).all()
    assert (picture[6:10, 1:7] == 3).all()
    assert (picture[6:10, 15:21] == 96).all()  # the sixth place is empty


def text_of(picture, images, row, size):
    """What stands beside a row of a grid: where the margin is not gray, [height, width]."""
    shape = grid(images, columns=3).shape
    margin = picture[:, : picture.shape[1] - shape[1], 0]
    return margin[4 + row * (size + 4) :][:size] != 96


@pytest.mark.parametrize("library", ["matplotlib", "Pillow"])
@pytest.mark.parametrize(
    ("side", "channels", "size"), [(8, 1, 48), (64, 3, 64), (256, 3, 256), (1, 3, 48)]
)
def test_rows_show_their_class(side, channels, size, library, monkeypatch):
    """Text of at least 8 pixels beside its row alone; the images stay as they are."""
    if library == "Pillow":
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    images = np.random.default_rng(0).integers(0, 256, (9, side, side, channels), np.uint8)
    titles = ["0 cat", "", "2 dog"]
    picture, plain = grid(images, 3, titles), grid(images, 3)
    assert picture.shape[2] == channels
    np.testing.assert_array_equal(picture[:, -plain.shape[1] :], plain)
    first, second, third = (text_of(picture, images, row, size) for row in range(3))
    assert not second.any()
    for text in (first, third):
        rows = np.flatnonzero(text.any(axis=1))
        assert np.ptp(rows) >= 8
        assert abs(rows.mean() - size / 2) < size / 6  # in the middle
    assert (first != third).any()
    np.testing.assert_array_equal(grid(images, 3, ["", "", ""]), plain)


def test_rows_of_one_class_are_named():
    labels = np.array([1, 1, 0, 0, 1, 0, 1])
    assert row_titles(labels, 2, ["cat", "dog"]) == ["1 dog", "0 cat", "", "1 dog"]
    assert row_titles(labels, 2, ()) == ["1", "0", "", "1"]
    assert row_titles(np.full(4, -1), 2, ()) == ["", ""]  # an unconditional network
    strange = ["x" * 10**6, "a\nb\x1b[2J\u202e", "\U0001f431 猫"]
    long, control, rare = row_titles(np.arange(3), 1, strange)
    assert len(long) < 40
    assert control.isprintable()
    images = np.zeros((3, 8, 8, 3), np.uint8)
    assert grid(images, 1, [long, control, rare]).shape[1] < 400


def test_the_picture_of_an_output_shows_the_classes(tmp_path):
    labels = np.array([0, 0, 1, 1], np.int32)
    for name, names in (("named", ["cat", "dog"]), ("numbered", ()), ("none", ())):
        chosen = np.full(4, -1, np.int32) if name == "none" else labels
        output = Output(tmp_path / f"{name}.png", np.arange(4), chosen, "one", 2, names)
        output.write(IMAGES[:4])
        output.finish(ABOUT)
    widths = [Image.open(tmp_path / f"{n}.png").width for n in ("named", "numbered", "none")]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
