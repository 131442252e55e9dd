"""Checkpoints of a run in an object store, on a real server."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lora_diffusion_jax import remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training import checkpoint, transfer
from lora_diffusion_jax.training.checkpoint import Checkpoints, open_for_reading, saved_steps
from tests.training.test_checkpoint import Sums, assert_equal, make_state, save, shapes


@pytest.fixture
def workdir(base):
    return Path(remote.local(base))


def again(workdir):
    """The same run as another process sees it: through a mirror of its own."""
    url = remote.url_of(workdir)
    remote.close()
    return Path(remote.local(url))


def weights_objects(store, workdir, step):
    url = remote.url_of(workdir / "checkpoints" / str(step) / "weights")
    sizes = {path: about["size"] for path, about in store.find(url, detail=True).items()}
    return sorted(sizes, key=sizes.get)


def test_everything_comes_back_and_the_newest_are_kept(workdir):
    save(workdir, 1, 2, 3, 4, keep=2)
    workdir = again(workdir)
    assert saved_steps(workdir) == [3, 4]
    with Checkpoints(workdir, keep=2) as checkpoints:
        step, parts = checkpoints.restore(shapes(make_state()))
        state, sums = checkpoint.from_parts(parts, make_state(), Sums(np.zeros(2)))
        assert step == 4
        assert_equal(state, make_state(4))
        assert_equal(sums, Sums(np.full(2, 4.0)))
        checkpoints.save(4, parts)  # it is there
        checkpoints.save(5, parts)
    assert saved_steps(workdir) == [4, 5]
    workdir = again(workdir)
    assert_equal(open_for_reading(workdir, 4)[1].params, make_state(4).params)
    assert not (workdir / "checkpoints").exists()  # what was read does not stay


def test_the_sums_are_those_of_the_files_in_the_store(workdir):
    save(workdir, 1)
    folder = again(workdir) / "checkpoints" / "1"
    transfer.fetch(folder)
    assert checkpoint.find_damage(folder) == ""
    assert checkpoint.is_verified(folder)


@pytest.mark.parametrize("damage", ["bits", "missing", "cut", "metadata"])
def test_a_damaged_one_is_told_set_aside_and_the_one_before_is_used(workdir, store, damage, capsys):
    save(workdir, 1, 2)
    largest = weights_objects(store, workdir, 2)[-1]
    data = bytearray(store.cat_file(largest))
    if damage == "bits":
        data[len(data) // 2] ^= 1
        store.pipe_file(largest, bytes(data))
    elif damage == "cut":
        store.pipe_file(largest, bytes(data[:-7]))
    elif damage == "missing":
        store.rm_file(largest)
    else:
        store.rm_file(f"{remote.url_of(workdir)}/checkpoints/2/_CHECKPOINT_METADATA")
    workdir = again(workdir)
    assert open_for_reading(workdir)[0] == 1  # reading changes nothing
    assert saved_steps(workdir) == [1, 2]
    with pytest.raises(UserError, match="No checkpoint in gs://.* can be read|can be read"):
        open_for_reading(workdir, 2)

    with Checkpoints(workdir) as checkpoints:
        step, parts = checkpoints.restore(shapes(make_state()))
        assert step == 1
        assert saved_steps(workdir) == [1]
        checkpoints.save(2, parts)
    assert saved_steps(workdir) == [1, 2]
    names = [path.name for path in checkpoint.set_aside_before(workdir)]
    assert names == ["unreadable-2"]
    printed = capsys.readouterr().out
    assert f"checkpoint 2 in {remote.url_of(workdir)}/checkpoints cannot be read" in printed


def test_one_that_was_not_carried_over_whole_does_not_count(workdir, store):
    """A kill while it was being uploaded, or removed."""
    save(workdir, 1, 2)
    url = f"{remote.url_of(workdir)}/checkpoints"
    for name in ("_CHECKPOINT_METADATA", "SHA256SUMS"):
        store.rm_file(f"{url}/2/{name}")
    workdir = again(workdir)
    assert saved_steps(workdir) == [1]
    assert open_for_reading(workdir)[0] == 1
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.restore(shapes(make_state()))[0] == 1
    assert not store.find(f"{url}/2")


def test_a_failed_upload_ends_the_run_and_leaves_no_checkpoint(workdir, monkeypatch):
    save(workdir, 1)

    def fail(*_, **__):
        raise UserError("Cannot use the store")

    with Checkpoints(workdir) as checkpoints:
        checkpoints.restore(shapes(make_state()))
        with monkeypatch.context() as patch:
            patch.setattr(remote, "push", fail)
            checkpoints.save(2, checkpoint.to_parts(make_state(2), Sums(np.zeros(2))))
            with pytest.raises(UserError, match="Cannot use the store"):
                checkpoints.wait()
    assert saved_steps(workdir) == [1]


def test_a_copied_run_of_this_machine_is_read(tmp_path, workdir, store):
    """As a user copies it with the store's own tools; without checksums, of an older version, as well."""
    save(tmp_path / "run", 1, 2)
    (tmp_path / "run" / "checkpoints" / "1" / "SHA256SUMS").unlink()
    for folder in ("checkpoints", "base"):
        store.put(str(tmp_path / "run" / folder), remote.url_of(workdir) + "/", recursive=True)
    assert saved_steps(workdir) == [1, 2]
    for step in (1, 2):
        assert_equal(open_for_reading(workdir, step)[1].params, make_state(step).params)


def test_the_devices_may_change(workdir):
    """Saved with one layout, restored onto another; conftest gives one device, so replicated."""
    save(workdir, 3)
    workdir = again(workdir)
    with Checkpoints(workdir) as checkpoints:
        _, parts = checkpoints.restore(shapes(make_state()))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(parts))
