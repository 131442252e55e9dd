"""Frozen weights lie in the run's directory once."""

import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training import base
from lora_diffusion_jax.training.checkpoint import (
    Checkpoints,
    find_damage,
    from_parts,
    open_for_reading,
    saved_steps,
    to_parts,
)
from tests.small import ROOT, run_on_eight
from tests.training.test_checkpoint import Sums, assert_equal, make_state, save, shapes


def restore(workdir):
    """(step, state) as training resumes it."""
    with Checkpoints(workdir) as checkpoints:
        step, parts = checkpoints.restore(shapes(make_state()))
    return step, from_parts(parts, make_state(), Sums(jnp.zeros(2)))[0]


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_checkpoints_hold_what_changes_and_resuming_writes_no_second_base(tmp_path):
    wide = make_state(1, width=100_000)
    noise = np.random.default_rng(0).normal(size=(2, 100_000)).astype(np.float32)
    wide = wide.replace(frozen={"a": {"kernel": jnp.asarray(noise)}})
    for steps in ((1, 2), (3,)):  # two processes, one after the other
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.restore(shapes(wide))
            for step in steps:
                checkpoints.save(step, to_parts(wide, Sums(jnp.zeros(2))))
    assert saved_steps(tmp_path) == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "checkpoints"]
    assert size(tmp_path / "base") > 0.8 * noise.nbytes
    assert all(size(tmp_path / "checkpoints" / str(step)) < 20_000 for step in (2, 3))
    metadata = json.loads((tmp_path / "checkpoints" / "3" / base.METADATA).read_text())
    sums = (tmp_path / "base" / "SHA256SUMS").read_bytes()
    assert metadata["custom_metadata"]["base"]["sha256"] == hashlib.sha256(sums).hexdigest()
    np.testing.assert_array_equal(open_for_reading(tmp_path, 2)[1].frozen["a"]["kernel"], noise)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["missing", "bits", "sums", "another", "no sums", "file"])
def test_a_missing_or_changed_base_is_a_sentence_and_the_checkpoints_stay(tmp_path, damage):
    run, folder = tmp_path / "run", tmp_path / "run" / "base"
    save(run, 1, 2)
    shutil.copytree(folder, tmp_path / "copy")
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "bits":
        flip(largest_file(folder / "weights"))
    elif damage == "sums":
        flip(folder / "SHA256SUMS")
    elif damage == "no sums":
        (folder / "SHA256SUMS").unlink()
    elif damage == "file":
        largest_file(folder / "weights").unlink()
    else:
        save(tmp_path / "other", 1)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other" / "base", folder)
        (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text()[::-1])
    for use in (open_for_reading, restore, lambda w: find_damage(w / "checkpoints" / "2")):
        with pytest.raises(UserError, match=r"run/base, which holds the frozen weights of") as e:
            use(run)
        assert "Restore it from a copy of the run" in str(e.value)
    assert saved_steps(run) == [1, 2]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "copy", folder)
    step, state = restore(run)
    assert step == 2
    assert_equal(state, make_state(2))


def test_runs_with_the_base_in_every_checkpoint_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # as older versions saved
        patch.setattr(Checkpoints, "_without_base", lambda self, parts: parts)
        save(tmp_path, 1)
    assert not (tmp_path / "base").exists()
    step, state = restore(tmp_path)
    assert step == 1
    assert_equal(state, make_state(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(shapes(make_state()))
        checkpoints.save(2, to_parts(make_state(2), Sums(jnp.zeros(2))))
    for step in (1, 2):
        assert_equal(open_for_reading(tmp_path, step)[1].frozen, make_state(step).frozen)
    assert_equal(restore(tmp_path)[1], make_state(2))


def test_a_base_to_which_no_checkpoint_refers_is_replaced(tmp_path):
    """A kill between it and the first checkpoint."""
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "base" / "SHA256SUMS").unlink()
    save(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "checkpoints"]
    assert_equal(restore(tmp_path)[1], make_state(1))


def test_a_run_begun_anew_beside_checkpoints_that_were_set_aside_gets_a_base_of_its_own(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "unreadable-1")
    save(tmp_path, 1)
    assert base.reference_of(tmp_path / "checkpoints" / "1")["folder"] == "base-2"
    assert base.reference_of(tmp_path / "checkpoints" / "unreadable-1")["folder"] == "base"


def test_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        save(tmp_path / "run", 1)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "about", [{}, {"base": None}, {"base": {"folder": "../x", "sha256": "0" * 64}}, [], "x"]
)
def test_metadata_of_another_form_name_no_base(tmp_path, about):
    folder = tmp_path / "checkpoints" / "1"
    folder.mkdir(parents=True)
    (folder / base.METADATA).write_text(json.dumps({"custom_metadata": about}))
    assert base.reference_of(folder) is None


EIGHT = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lora_diffusion_jax.training.checkpoint import Checkpoints, open_for_reading

values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
for step, (axes, spec) in enumerate([((8,), P("a")), ((2, 4), P("b", "a"))], 1):
    where = NamedSharding(jax.make_mesh(axes, ("a", "b")[: len(axes)]), spec)
    part = lambda name: {name: jax.device_put(values, where)}
    weights = {"params": part("p"), "frozen": part("f"), "buffers": {}, "ema": part("p")}
    parts = {"weights": weights, "optimizer": part("n"), "interval": part("n")}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), parts)
    with Checkpoints(sys.argv[1]) as checkpoints:
        found = checkpoints.restore(like)
        assert (found is None) == (step == 1)
        for leaf in jax.tree.leaves(found and found[1]):
            assert leaf.sharding == where
            np.testing.assert_array_equal(leaf, values)
        checkpoints.save(step, parts)
assert len(jax.devices()) == 8
np.testing.assert_array_equal(open_for_reading(sys.argv[1], 1)[1].frozen["f"], values)
"""


def test_it_is_spread_over_eight_devices_and_comes_back_on_another_mesh(tmp_path):
    run_on_eight("-c", EIGHT, tmp_path, cwd=ROOT)
    assert [path.name for path in tmp_path.glob("base*")] == ["base"]
