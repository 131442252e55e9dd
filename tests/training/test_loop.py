import dataclasses
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.keys import INIT, TRAIN, purpose_key
from lora_diffusion_jax.training import monitor
from lora_diffusion_jax.training.checkpoint import SavedWeights, save_weights, saved_steps
from lora_diffusion_jax.training.feed import Feed, take
from lora_diffusion_jax.training.loop import Cadence
from lora_diffusion_jax.training.metrics import to_scalars
from lora_diffusion_jax.training.monitor import DivergedError
from lora_diffusion_jax.training.optimizer import adam
from lora_diffusion_jax.training.sharding import batch_sharding, make_mesh
from lora_diffusion_jax.training.state import create_state
from lora_diffusion_jax.training.writers import read_metrics
from tests.training.stand_in import (
    BATCH,
    CLASSES,
    SIZE,
    ArrayBatches,
    Objective,
    digest,
    init_variables,
    make_data,
    make_run,
    make_step,
    run,
)


def run_by_hand(arguments, steps):
    """The contract of the loop, spelled out: batch k, key k, one step after the other."""
    step = jax.jit(arguments["step_fn"])
    state, losses = arguments["init"](purpose_key(arguments["seed"], INIT)), []
    for k in range(steps):
        index = arguments["batches"].indices(k)
        batch = {name: rows[index] for name, rows in arguments["batches"].source.items()}
        key = jax.random.fold_in(purpose_key(arguments["seed"], TRAIN), k)
        state, metrics = step(state, batch, key)
        losses.append(to_scalars(metrics)["train/loss"])
    return state, losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 17 steps without disturbance."""
    arguments = make_run(tmp_path_factory.mktemp("straight"), total=17, flops_per_image=1e9)
    return arguments, run(**arguments)


def test_the_loop_is_its_contract(straight):
    arguments, result = straight
    state, losses = run_by_hand(arguments, 17)
    assert (result.step, result.exit_code) == (17, 0)
    # Compiled with the gather, the step may be fused otherwise: float32's rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result.state, state
    )
    lines = read_metrics(arguments["workdir"])
    assert [line["step"] for line in lines] == [7, 14, 17]
    assert [line["images"] for line in lines] == [7 * BATCH, 14 * BATCH, 17 * BATCH]
    for line, part in zip(lines, (losses[:7], losses[7:14], losses[14:]), strict=True):
        assert line["train/loss"] == pytest.approx(np.mean(part), rel=1e-5)
    assert saved_steps(arguments["workdir"]) == [10, 15, 17]


def test_speed_is_logged(straight):
    for line in read_metrics(straight[0]["workdir"]):
        rate = line["perf/images_per_sec"]
        assert line["perf/sec_per_step"] == pytest.approx(BATCH / rate)
        assert line["perf/tflops_per_sec"] == pytest.approx(rate / 1e3)
        left = (17 * BATCH - line["images"]) / rate
        assert line["perf/eta_sec"] == pytest.approx(left)
        assert 0 <= line["perf/input_wait"] + line["perf/checkpoint_wait"] <= 1


def test_streamed_batches_train_the_same(straight, tmp_path):
    result = run(**make_run(tmp_path, total=17, in_memory=False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        result.state.params,
        straight[1].state.params,
    )


def test_a_longer_run_goes_on_where_a_shorter_ended(straight, tmp_path, capsys):
    run(**make_run(tmp_path, total=9))
    result = run(**make_run(tmp_path, total=17))
    assert digest(result.state) == digest(straight[1].state)
    out = capsys.readouterr().out
    assert "resuming from the checkpoint of step 9" in out
    assert f"train.total_images changes from {9 * BATCH} to {17 * BATCH}" in out
    assert [line["step"] for line in read_metrics(tmp_path)] == [7, 9, 14, 17]


def test_a_finished_run_has_nothing_left(straight, capsys):
    arguments, result = straight
    again = run(**arguments)
    assert "nothing is left to train" in capsys.readouterr().out
    assert digest(again.state) == digest(result.state)


def test_callbacks_get_the_state_of_their_step_and_their_values_are_logged(tmp_path):
    seen = []

    def sample(state, step):
        assert int(state.step) == step
        seen.append(("samples", step))
        return {"samples/grid": np.zeros((2, 2, 3), np.uint8)}

    def evaluate(state, step):
        seen.append(("eval", step))
        return {"eval/norm": float(jnp.abs(state.ema["mid"]["kernel"]).sum())}

    cadence = {"sample_every": 4 * BATCH, "eval_every": 5 * BATCH + 1}
    callbacks = {"samples": sample, "eval": evaluate}
    run(**make_run(tmp_path, total=11, callbacks=callbacks, cadence=cadence))
    assert seen == [("samples", 4), ("eval", 6), ("samples", 8), ("samples", 11), ("eval", 11)]
    lines = [line for line in read_metrics(tmp_path) if "callback" in line]
    assert [(line["callback"], line["step"]) for line in lines] == seen
    assert all("eval/norm" in line for line in lines if line["callback"] == "eval")


def test_a_callback_that_fails_ends_the_run_and_is_repeated(tmp_path):
    calls = []

    def evaluate(state, step):
        calls.append(step)
        if calls == [3, 6]:
            raise RuntimeError("no room for features")
        return

    options = {"callbacks": {"eval": evaluate}, "cadence": {"eval_every": 3 * BATCH}, "total": 7}
    options["cadence"]["checkpoint_every"] = 3 * BATCH
    with pytest.raises(RuntimeError, match="no room for features"):
        run(**make_run(tmp_path, **options))
    assert saved_steps(tmp_path) == [3, 6]
    run(**make_run(tmp_path, **options))
    assert calls == [3, 6, 6, 7]
    run(**make_run(tmp_path, **options))
    assert calls == [3, 6, 6, 7]


def test_a_signal_cuts_a_callback_short_and_resuming_repeats_it(tmp_path):
    calls, after = [], []

    def evaluate(state, step):
        calls.append(step)
        if calls == [3]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the signal is handled here at the latest
            after.append(step)

    options = {"callbacks": {"eval": evaluate}, "cadence": {"eval_every": 3 * BATCH}, "total": 5}
    result = run(**make_run(tmp_path, **options))
    assert (result.step, result.exit_code) == (3, 128 + signal.SIGTERM)
    assert saved_steps(tmp_path) == [3]
    result = run(**make_run(tmp_path, **options))
    assert (result.step, result.exit_code, calls, after) == (5, 0, [3, 3, 5], [])


def test_another_config_is_refused_and_the_run_stays(straight):
    arguments = straight[0]
    other = {"train": {"batch_size": 99}, "model": "net"}
    with pytest.raises(UserError, match="train.batch_size: 16 there, 99 now"):
        run(**arguments | {"config": other})


def test_a_workdir_that_vanishes_ends_the_run(tmp_path):
    workdir = tmp_path / "run"
    arguments = make_run(workdir, callbacks={"eval": lambda state, step: shutil.rmtree(workdir)})
    cadence = dataclasses.replace(arguments["cadence"], eval_every=BATCH)
    with pytest.raises(UserError, match="run/metrics.jsonl has disappeared"):
        run(**arguments | {"cadence": cadence})
    assert not workdir.exists()


class NanFromStep6(Objective):
    """The step is found again in its key."""

    def draw(self, key, shape):
        steps = jnp.arange(20)
        keys = jax.vmap(lambda k: jax.random.fold_in(purpose_key(3, TRAIN), k))(steps)
        here = (jax.random.key_data(keys) == jax.random.key_data(key)).all(axis=-1)
        return {**super().draw(key, shape), "step": jnp.full(shape[0], jnp.argmax(here))}

    def loss(self, variables, images, labels, draws, train):
        pixels = super().loss(variables, images, labels, draws, train)["loss"]
        return {"loss": jnp.where(draws["step"][:, None, None, None] >= 6, jnp.nan, pixels)}


@pytest.mark.parametrize(("every", "saved"), [(5, True), (50, False)])
def test_a_loss_that_stays_nan_stops_with_the_step(tmp_path, every, saved):
    """Steps 7, 8, 9 (from the seventh on) are bad: the run ends there."""
    options = {"objective": NanFromStep6(), "max_bad_steps": 3}
    cadence = {"checkpoint_every": every * BATCH}
    with pytest.raises(DivergedError, match="3 steps in a row, from step 7 to 9") as caught:
        run(**make_run(tmp_path, total=20, step_options=options, cadence=cadence))
    assert (f"init_from={tmp_path}, of step 5" in str(caught.value)) == saved
    assert saved_steps(tmp_path) == ([5] if saved else [])


def test_imported_weights_are_what_training_begins_with(tmp_path):
    optimizer = adam(1e-30)  # does not move the weights
    state = create_state(init_variables(), optimizer)
    params = jax.tree.map(lambda p: p + 3, state.params)
    save_weights(tmp_path, SavedWeights(params, {}, {}, params))
    options = {"init": state, "step_fn": make_step(optimizer)}  # a state, not a function
    result = run(**make_run(tmp_path, total=2, **options))
    jax.tree.map(np.testing.assert_array_equal, result.state.params, params)
    assert not state.params["mid"]["kernel"].is_deleted()  # the caller's arrays are not donated
    assert saved_steps(tmp_path) == [0, 2]


@pytest.mark.parametrize("field", ["total_images", "log_every", "checkpoint_every", "keep"])
def test_a_cadence_that_never_comes_is_refused(field):
    good = {"total_images": 100, "log_every": 10, "checkpoint_every": 10}
    with pytest.raises(UserError, match=f"train.{field} is 0"):
        Cadence(**good | {field: 0})


@pytest.mark.parametrize("in_memory", [False, True])
def test_feed_gives_batch_k_either_way(in_memory):
    batches = ArrayBatches(*make_data(), BATCH, in_memory=in_memory)
    with Feed(batches, make_mesh(), start=5) as feed:
        assert bool(feed.data) == in_memory
        for step in (5, 6):
            item = feed.next()
            assert all(array.sharding == batch_sharding(feed.mesh) for array in item.values())
            batch = take(feed.data, item)
            index = batches.indices(step)
            assert batch.keys() == batches.source.keys()
            for name, rows in batches.source.items():
                np.testing.assert_array_equal(batch[name], rows[index])
    assert feed.waited > 0
    assert batch["image"].shape == (BATCH, SIZE, SIZE, 3)
    assert int(batch["label"].max()) < CLASSES


def test_a_signal_while_resuming_is_not_forgotten(tmp_path, monkeypatch):
    """It comes while the run looks for callbacks that are left; nothing is trained, all is kept."""
    run(**make_run(tmp_path / "run", total=5))
    call = monitor.Callbacks.run

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(*arguments)

    monkeypatch.setattr(monitor.Callbacks, "run", interrupted)
    result = run(**make_run(tmp_path / "run", total=10))
    assert (result.step, result.exit_code) == (5, 128 + signal.SIGTERM)


def test_an_event_is_due_at_the_first_step_that_reaches_its_multiple():
    cadence = Cadence(total_images=100, log_every=30, checkpoint_every=64, sample_every=50)
    due = {step: cadence.due(step, batch_size=16) for step in range(cadence.steps(16) + 1)}
    assert due == {
        0: set(),
        1: set(),
        2: {"log"},  # 32 images
        3: set(),
        4: {"log", "checkpoint", "samples"},  # 64
        5: set(),
        6: {"log"},  # 96
        7: {"log", "checkpoint", "samples"},  # the last; evaluation never
    }


def test_another_seed_begins_with_other_weights_and_compiles_no_program_again(tmp_path, caplog):
    def begin(seed):
        def fresh(key):  # a function of its own for every run, as of every process
            weights = jax.tree.map(
                lambda leaf: jax.random.normal(key, leaf.shape), init_variables()
            )
            return create_state(weights, adam(2e-3))

        with caplog.at_level("DEBUG", logger="jax._src.compiler"):
            return run(**make_run(tmp_path / str(seed), total=1, init=fresh, seed=seed)).state

    first = begin(1)
    caplog.clear()
    second = begin(2)
    found = [record.getMessage() for record in caplog.records]
    assert any("cache hit for 'jit_fresh'" in message for message in found), found
    assert not any("CACHE MISS for 'jit_fresh'" in message for message in found)
    for one, other in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
        assert not np.array_equal(one, other)
