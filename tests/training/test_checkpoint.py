import shutil
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.checkpoint import (
    Checkpoints,
    find_damage,
    from_parts,
    open_for_reading,
    save_weights,
    saved_steps,
    to_parts,
)
from lora_diffusion_jax.training.optimizer import adam
from lora_diffusion_jax.training.state import (
    SavedWeights,
    create_state,
    ema_variables,
    raw_variables,
)


@flax.struct.dataclass
class Sums:
    total: jax.Array


def make_state(fill=0.0, width=3):
    # frozen weights are those of the run, whatever the step
    params = {"a": {"kernel": jnp.full((2, width), 7.0)}, "lora": {"up": jnp.full(4, fill)}}
    variables = {"params": params, "buffers": {"freqs": jnp.arange(2.0)}}
    state = create_state(variables, adam(1e-3), lambda path: "lora" in path)
    return state.replace(ema=jax.tree.map(lambda p: p + 0.5, state.params), step=jnp.int32(fill))


def shapes(state):
    parts = to_parts(state, Sums(jnp.zeros(2)))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts
    )


def save(workdir, *steps, **options):
    with Checkpoints(workdir, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, to_parts(make_state(step), Sums(jnp.full(2, step))))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_everything_comes_back_in_its_own_types(tmp_path):
    save(tmp_path, 7)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        step, parts = checkpoints.restore(shapes(make_state()))
    state, sums = from_parts(parts, make_state(), Sums(jnp.zeros(2)))
    assert step == 7
    assert_equal(state, make_state(7))
    assert_equal(sums, Sums(jnp.full(2, 7)))


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(shapes(make_state())) is None


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert saved_steps(tmp_path) == [4, 5]


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, to_parts(make_state(99), Sums(jnp.zeros(2))))
    assert float(open_for_reading(tmp_path)[1].params["lora"]["up"][0]) == 3


def test_saved_values_are_those_of_the_call_though_buffers_are_donated(tmp_path):
    """The next step writes into the donated memory while the thread is still saving."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"w": jnp.zeros(2_000_000)}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for k in range(1, 5):
            state = step(state)
            checkpoints.save(k, {"weights": {"params": state}})
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
            state = jax.tree.map(lambda x, k=k: jnp.full_like(x, k), state)
    for k in range(1, 5):
        values = open_for_reading(tmp_path, k)[1].params["w"]
        assert (values.min(), values.max()) == (k, k)


def test_reading_gives_weights_to_assemble(tmp_path):
    save(tmp_path, 1, 2)
    step, weights = open_for_reading(tmp_path)
    assert step == 2
    assert isinstance(weights.params["lora"]["up"], np.ndarray)
    assert_equal(raw_variables(weights), raw_variables(make_state(2)))
    assert ema_variables(weights)["params"]["lora"]["up"][0] == 2.5
    assert ema_variables(weights)["params"]["a"]["kernel"][0, 0] == 7  # frozen: not averaged
    assert open_for_reading(tmp_path, 1)[1].params["lora"]["up"][0] == 1


def test_errors_of_reading_list_what_there_is(tmp_path):
    with pytest.raises(UserError, match="no checkpoints"):
        open_for_reading(tmp_path)
    save(tmp_path, 1, 2)
    with pytest.raises(UserError, match="no checkpoint 5; there are: 1, 2"):
        open_for_reading(tmp_path, 5)


def test_another_network_is_an_error_and_nothing_is_renamed(tmp_path):
    save(tmp_path, 1, 2)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"frozen/a/kernel: \(2, 3\) saved, \(2, 5\) wanted"),
    ):
        checkpoints.restore(shapes(make_state(width=5)))
    assert saved_steps(tmp_path) == [1, 2]


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGE = {
    "one bit": lambda folder: flip(largest_file(folder / "weights" / "d"), 1000),
    "one bit of the optimizer": lambda folder: flip(largest_file(folder / "optimizer" / "d"), 999),
    "no optimizer": lambda folder: shutil.rmtree(folder / "optimizer"),
    "no optimizer, old": lambda folder: [
        shutil.rmtree(folder / "optimizer"),
        (folder / "SHA256SUMS").unlink(),
    ],
    "checksums cut": lambda folder: (folder / "SHA256SUMS").write_text("ba78"),
    "cut": lambda folder: largest_file(folder).write_bytes(largest_file(folder).read_bytes()[:-40]),
    "one file lost": lambda folder: next((folder / "optimizer" / "d").iterdir()).unlink(),
    "all data lost": lambda folder: [p.unlink() for p in folder.rglob("d/*")],
    "description cut": lambda folder: (folder / "weights" / "_METADATA").write_text('{"tree'),
    "empty": lambda folder: [p.unlink() for p in folder.rglob("*") if p.is_file()],
}


# Orbax leaves an event loop half closed when a file is missing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_checkpoint_is_skipped_and_logged(tmp_path, damage, capsys):
    save(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path) as checkpoints:
        step, parts = checkpoints.restore(shapes(make_state()))
        assert step == 1
        assert parts["weights"]["params"]["lora"]["up"][0] == 1
        checkpoints.save(2, to_parts(make_state(2), Sums(jnp.zeros(2))))
    assert "checkpoint 2 " in capsys.readouterr().out
    assert saved_steps(tmp_path) == [1, 2]
    assert open_for_reading(tmp_path)[0] == 2


def test_what_was_set_aside_is_kept(tmp_path):
    save(tmp_path, 1, 2)
    DAMAGE["one bit"](tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(shapes(make_state()))[0] == 1
        checkpoints.save(3, to_parts(make_state(3), Sums(jnp.zeros(2))))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["3", "unreadable-2"]
    assert find_damage(tmp_path / "checkpoints" / "3") == ""


def test_a_checkpoint_without_checksums_is_read_and_reported(tmp_path, capsys):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "SHA256SUMS").unlink()
    assert open_for_reading(tmp_path)[0] == 1
    assert open_for_reading(tmp_path)[0] == 1
    assert capsys.readouterr().out.count("without checksums") == 1


@pytest.mark.parametrize("name", ["99999999999999999999", "003", "\u0663", "1000000000000"])
def test_other_names_of_digits_are_no_checkpoints(tmp_path, name):
    save(tmp_path, 1, 2)
    stray = tmp_path / "checkpoints" / name
    shutil.copytree(tmp_path / "checkpoints" / "2", stray)
    assert saved_steps(tmp_path) == [1, 2]
    assert open_for_reading(tmp_path)[0] == 2
    with pytest.raises(UserError, match=f"{name} is named like a checkpoint"):
        Checkpoints(tmp_path)
    stray.rename(stray.with_name("old"))
    save(tmp_path, 10**9)
    assert saved_steps(tmp_path) == [1, 2, 10**9]


def test_weights_are_read_though_the_optimizer_is_damaged(tmp_path):
    save(tmp_path, 1, 2)
    DAMAGE["one bit of the optimizer"](tmp_path / "checkpoints" / "2")
    assert open_for_reading(tmp_path)[0] == 2
    assert "optimizer/" in find_damage(tmp_path / "checkpoints" / "2")


def test_links_among_checkpoints_are_refused(tmp_path):
    (tmp_path / "outside" / "9").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "9").symlink_to(tmp_path / "outside" / "9")
    with pytest.raises(UserError, match="checkpoints/9 is a link"):
        Checkpoints(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="checkpoints is a link"):
        Checkpoints(tmp_path / "other")
    assert (tmp_path / "outside" / "9").is_dir()


def test_reading_skips_an_unreadable_checkpoint_too(tmp_path, capsys):
    save(tmp_path, 1, 2)
    DAMAGE["cut"](tmp_path / "checkpoints" / "2" / "weights")
    assert open_for_reading(tmp_path)[0] == 1
    assert "checkpoint 2 " in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "2").exists()


def test_if_none_is_readable_training_does_not_silently_start_over(tmp_path):
    save(tmp_path, 1)
    DAMAGE["cut"](tmp_path / "checkpoints" / "1")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="No checkpoint .* can be read"),
    ):
        checkpoints.restore(shapes(make_state()))
    assert (tmp_path / "checkpoints" / "1").exists()


def test_weights_alone_can_be_written_and_restored(tmp_path):
    weights = SavedWeights(
        **{n: getattr(make_state(4), n) for n in ("params", "frozen", "buffers", "ema")}
    )
    save_weights(tmp_path, weights)
    assert_equal(open_for_reading(tmp_path), (0, jax.tree.map(np.asarray, weights)))
    with Checkpoints(tmp_path) as checkpoints:
        step, parts = checkpoints.restore(shapes(make_state()))
    assert (step, set(parts)) == (0, {"weights"})


FILL = """
import resource, sys, time
import jax.numpy as jnp
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.checkpoint import Checkpoints

try:
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
        checkpoints.save(1, {"weights": {"params": {"w": jnp.ones(100)}}})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        noise = jnp.sin(jnp.arange(4e5) ** 2)  # nothing that compresses
        checkpoints.save(2, {"weights": {"params": {"w": noise}}})
        print("saving", flush=True)
        for _ in range(200):
            time.sleep(0.05)
            checkpoints.check()
        print("never raised")
except UserError as error:
    print(error)
"""


def test_a_disk_that_fills_up_in_the_background_is_an_error_and_the_old_checkpoint_stays(tmp_path):
    """The process may write no file above 100 kB: a disk that is full for large files alone."""
    done = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("saving\nCannot use "), done
    assert "file too large. What was saved before is untouched" in done.stdout
    assert "Traceback" not in done.stderr
    assert open_for_reading(tmp_path)[0] == 1


def test_a_file_in_place_of_the_folder_is_an_error_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="Cannot use .*checkpoints: "):
        Checkpoints(tmp_path)


def test_a_process_that_orbax_waited_for_is_not_a_disk_error(tmp_path, monkeypatch):
    def time_out(error):
        with Checkpoints(tmp_path) as checkpoints, checkpoints._save_errors():
            raise error

    with pytest.raises(UserError, match="Cannot use .*: connection timed out"):
        time_out(TimeoutError(110, "Connection timed out"))  # of a network file system
    monkeypatch.setattr("lora_diffusion_jax.processes.alone", lambda: False)
    monkeypatch.setattr("lora_diffusion_jax.training.checkpoint.LAST_SAVE_LIMIT", 0.0)
    with pytest.raises(RuntimeError, match="lost connection to another process: no barrier"):
        time_out(TimeoutError("no barrier"))
