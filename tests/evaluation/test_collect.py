"""Partial sums on disk, however they were left."""

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import collect
from lora_diffusion_jax.evaluation.collect import collect_resumable


class Killed(Exception):
    pass


def gather(detector, images, home, stop=None, rows=True, given=None):
    """The features of some images, perhaps killed when `stop` of them have been read."""

    def batches(done):
        if given is not None:
            given.append(done)
        for start in range(done, len(images), 16):
            if stop is not None and start >= stop:
                raise Killed
            yield images[start : start + 16]

    return collect_resumable(detector, batches, len(images), home, {"a": 1}, keep_rows=rows)


def test_every_interruption_ends_with_the_same_bits(detector, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SAVE_SECONDS", 0.0)
    images = digits[0].images[:150]
    whole = gather(detector, images, tmp_path / "whole")
    for stop in (32, 64, 144):
        with pytest.raises(Killed):
            gather(detector, images, tmp_path / "cut", stop)
    starts = []
    again = gather(detector, images, tmp_path / "cut", given=starts)
    assert starts[0] >= 100
    np.testing.assert_array_equal(again.features, whole.features)
    np.testing.assert_array_equal(again.logits, whole.logits)
    for found, expected in zip(again.moments.result(), whole.moments.result(), strict=True):
        np.testing.assert_array_equal(found, expected)
    again.partial.remove()
    assert not list((tmp_path / "cut" / "partial").iterdir())


def test_a_kill_between_rows_and_sums_repeats_the_rows(detector, digits, tmp_path, monkeypatch):
    """Rows may have been written that the sums do not count."""
    images = digits[0].images[:96]
    whole = gather(detector, images, tmp_path / "whole")
    monkeypatch.setattr(collect, "SAVE_SECONDS", 0.0)
    original, writes = collect.write_npz, []

    def write(path, arrays):
        writes.append(path.name)
        if len(writes) >= 6:  # the third state is never written, nor anything after it
            raise Killed
        original(path, arrays)

    monkeypatch.setattr(collect, "write_npz", write)
    with pytest.raises(Killed):
        gather(detector, images, tmp_path / "cut")
    assert writes[4:] == ["0000000032.npz", "state.npz", "0000000032.npz"]
    monkeypatch.setattr(collect, "write_npz", original)
    starts = []
    again = gather(detector, images, tmp_path / "cut", given=starts)
    assert starts == [32]
    np.testing.assert_array_equal(again.features, whole.features)


@pytest.mark.parametrize("damage", ["state", "rows", "code"])
def test_damaged_sums_start_afresh(detector, digits, tmp_path, monkeypatch, damage):
    images = digits[0].images[:64]
    found = gather(detector, images, tmp_path)
    if damage == "code":
        monkeypatch.setattr(collect, "source_hash", lambda: "other")
    else:
        name = "state.npz" if damage == "state" else "0000000000.npz"
        path = found.partial.folder / name
        path.write_bytes(path.read_bytes()[:-100])
    starts = []
    again = gather(detector, images, tmp_path, given=starts)
    assert starts == [0]
    np.testing.assert_array_equal(again.features, found.features)


def test_rows_are_part_of_what_is_saved(detector, digits, tmp_path):
    images, starts = digits[0].images[:32], []
    assert gather(detector, images, tmp_path, rows=False).features is None
    gather(detector, images, tmp_path, given=starts)
    assert starts == [0]


def test_another_number_of_images_is_an_error(detector, digits, tmp_path):
    with pytest.raises(UserError, match="20 images were requested, but there are 8"):
        collect_resumable(detector, lambda done: [digits[0].images[:8]], 20, tmp_path, {})
