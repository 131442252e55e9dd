import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.paths import is_adapter, path_of, split
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.metrics import to_scalars
from lora_diffusion_jax.training.optimizer import Optimizer, adam
from lora_diffusion_jax.training.state import create_state, ema_variables, raw_variables
from lora_diffusion_jax.training.step import accumulate, joined, to_float, to_labels
from tests.small import fast_jit
from tests.training.stand_in import (
    BATCH,
    CLASSES,
    Objective,
    init_variables,
    make_data,
    make_step,
)


def batch(seed=0):
    images, labels = make_data()
    index = np.random.default_rng(seed).permutation(len(images))[:BATCH]
    return {"image": jnp.asarray(images[index]), "label": jnp.asarray(labels[index])}


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.fixture(scope="module")
def variables():
    return init_variables()


def test_gradient_is_of_the_sum_over_pixels_divided_by_the_batch(variables):
    """One step of plain descent moves the weights by the gradient of sum / B."""
    descent = Optimizer(optax.identity(), lambda seen: jnp.float32(1.0))
    state = create_state(variables, descent)
    key, data = jax.random.key(4), batch()
    after, metrics = fast_jit(make_step(descent))(state, data, key)
    images = np.asarray(data["image"]) / np.float32(127.5) - 1
    labels = np.eye(CLASSES, dtype=np.float32)[np.asarray(data["label"])]
    draws = Objective().draw(key, images.shape)

    def mean_loss(params):
        return Objective().loss({"params": params}, images, labels, draws, True)["loss"].mean()

    pixels = np.prod(images.shape[1:])
    value, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    moved = jax.tree.map(lambda a, b: (a - b) / pixels, state.params, after.params)
    # Differences of weights near 1 in float32, divided by 48.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, grads)
    assert to_scalars(metrics)["train/loss"] == pytest.approx(
        float(mean_loss(state.params)), rel=1e-6
    )


class NanAt(Objective):
    """A loss that is not finite in some steps: the test's keys are key(step)."""

    def __init__(self, *steps, value=jnp.nan):
        self.steps, self.value = jnp.array(steps), value

    def draw(self, key, shape):
        bad = jnp.isin(jax.random.key_data(key)[-1], self.steps)
        return {**super().draw(key, shape), "bad": jnp.full(shape[0], bad)}

    def loss(self, variables, images, labels, draws, train):
        pixels = super().loss(variables, images, labels, draws, train)["loss"]
        return {"loss": jnp.where(draws["bad"][:, None, None, None], self.value, pixels)}


def test_steps_equal_a_plain_loop_in_float64(variables):
    """Adam, average, norms and counters by hand, with ramp-up; the third loss of five is NaN."""
    optimizer, halflife = adam(1e-2, rampup_images=40), 50.0
    step = fast_jit(make_step(optimizer, NanAt(2), ema=Ema(halflife)))
    state = create_state(variables, optimizer)

    @fast_jit
    def gradient(params, data, key):
        images, labels = to_float(data["image"]), to_labels(data["label"], CLASSES)
        draws = Objective().draw(key, images.shape)
        terms = lambda p: Objective().loss({"params": p}, images, labels, draws, True)  # noqa: E731
        return jax.grad(lambda p: terms(p)["loss"].sum() / BATCH)(params)

    def flat(tree):
        return {path_of(k): np.float64(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}

    def norm(tree, chosen=lambda path: True):
        return np.sqrt(sum(np.square(v).sum() for k, v in tree.items() if chosen(k)))

    x = flat(state.params)
    average, m, v = dict(x), dict.fromkeys(x, 0.0), dict.fromkeys(x, 0.0)
    updates = 0
    for k in range(5):
        before, seen, key = state.params, BATCH * k, jax.random.key(k)
        state, metrics = step(state, batch(k), key)
        if k == 2:
            assert same(before, state.params)
            continue
        updates += 1
        g = flat(gradient(before, batch(k), key))
        rate, beta = (
            1e-2 * min(seen / 40, 1),
            0.5 ** (BATCH / max(min(halflife, 0.05 * seen), 1e-8)),
        )
        moved = {}
        for name in x:
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
            root = np.sqrt(v[name] / (1 - 0.999**updates)) + 1e-8
            moved[name] = -rate * m[name] / (1 - 0.9**updates) / root
            x[name] = x[name] + moved[name]
            average[name] = x[name] + beta * (average[name] - x[name])
        expected = {
            "train/grad_norm": norm(g),
            "train/lora_grad_norm": norm(g, is_adapter),
            "train/update_norm": norm(moved),
            "train/param_norm": norm(x),
            "train/learning_rate": rate,
        }
        scalars = to_scalars(metrics)
        assert {name: scalars[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    # Adam divides by the root of the second moment, which magnifies the rounding of tiny gradients.
    for tree, exact in ((state.params, x), (state.ema, average)):
        for name, value in flat(tree).items():
            np.testing.assert_allclose(value, exact[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert (int(state.step), int(state.skipped_steps), int(state.bad_in_row)) == (5, 1, 0)


def test_microbatches_train_like_the_full_batch(variables):
    optimizer = adam(1e-3)
    state = create_state(variables, optimizer)
    key = jax.random.key(0)
    (a, measured_a), (b, measured_b) = (
        fast_jit(make_step(optimizer, microbatch=size))(state, batch(), key)
        for size in (None, BATCH // 4)
    )
    scale = max(float(jnp.abs(m).max()) for m in jax.tree.leaves(a.opt_state[0].mu))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * scale),
        a.opt_state[0].mu,
        b.opt_state[0].mu,
    )
    for name, value in to_scalars(measured_a).items():  # the loss by noise level too
        assert to_scalars(measured_b)[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("unroll", [False, True])
def test_parts_of_a_batch_add_up(unroll):
    """Rows are cut and come back in their order; a key is folded with the part's number."""
    rows, key = jnp.arange(12.0), jax.random.key(3)

    def gradient(params, part):
        x, key = part
        grads = {"w": (params["w"] * x).sum(), "drawn": jax.random.uniform(key)}
        return grads, {"loss": 2 * x}

    params = {"w": jnp.float32(0.5), "drawn": jnp.float32(0)}
    grads, losses = accumulate(gradient, params, (rows, key), 3, unroll)
    drawn = [jax.random.uniform(jax.random.fold_in(key, part)) for part in range(3)]
    np.testing.assert_allclose(grads["w"], 33)
    np.testing.assert_allclose(grads["drawn"], sum(drawn), rtol=1e-6)
    np.testing.assert_array_equal(losses["loss"], 2 * rows)


@pytest.mark.parametrize("microbatch", [-1, 3, 32])
def test_a_microbatch_that_does_not_divide_is_refused(microbatch):
    with pytest.raises(UserError, match=rf"microbatch {microbatch} .*\[1, 2, 4, 8, 16\]"):
        make_step(adam(1e-3), microbatch=microbatch)


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    with pytest.raises(UserError, match="batch_size 0"):
        make_step(adam(1e-3), batch_size=0)


def test_frozen_weights_have_neither_moments_nor_average_and_stay(variables):
    optimizer = adam(1e-2)
    variables = {**variables, "buffers": {"freqs": jnp.arange(3.0)}}
    state = create_state(variables, optimizer, is_adapter)
    step = fast_jit(make_step(optimizer))
    after, metrics = step(state, batch(), jax.random.key(0))
    trained = {"lora": {"down": {"kernel": 0}, "up": {"kernel": 0}}}
    for tree in (after.params, after.ema, after.opt_state[0].mu):
        assert jax.tree.structure(tree) == jax.tree.structure(trained)
    assert same(after.frozen, state.frozen)
    assert same(after.buffers, variables["buffers"])
    assert not same(after.params, state.params)
    assert jax.tree.structure(raw_variables(after)) == jax.tree.structure(variables)
    assert same(ema_variables(after)["params"]["lora"], after.ema["lora"])
    scalars = to_scalars(metrics)
    assert scalars["train/lora_grad_norm"] == scalars["train/grad_norm"] > 0


def test_split_and_nothing_to_train(variables):
    chosen, rest = split(variables["params"], lambda path: path.startswith("mid/"))
    assert set(chosen) == {"mid"}
    assert "mid" not in rest
    with pytest.raises(UserError, match="No parameter is trained"):
        create_state(variables, adam(1e-3), lambda path: False)


def test_a_bad_loss_changes_nothing_but_the_counters(variables):
    optimizer = adam(1e-2)
    step = fast_jit(make_step(optimizer, NanAt(1, 2, value=jnp.inf)))
    states = [create_state(variables, optimizer)]
    for k in range(4):
        state, metrics = step(states[-1], batch(), jax.random.key(k))
        states.append(state)
        assert ("train/loss" in to_scalars(metrics)) == (k not in (1, 2))
    for tree in ("params", "opt_state", "ema"):
        assert same(getattr(states[1], tree), getattr(states[3], tree))
        assert not same(getattr(states[3], tree), getattr(states[4], tree))
    assert [int(s.skipped_steps) for s in states] == [0, 0, 1, 2, 2]
    assert [int(s.bad_in_row) for s in states] == [0, 0, 1, 2, 0]
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]


def test_too_many_bad_steps_in_a_row_halt_for_good(variables):
    optimizer = adam(1e-2)
    step = fast_jit(make_step(optimizer, NanAt(1, 2), max_bad_steps=2))
    state = create_state(variables, optimizer)
    states = [state := step(state, batch(), jax.random.key(k))[0] for k in range(5)]
    assert [bool(s.halted) for s in states] == [False, False, True, True, True]
    assert [int(s.bad_in_row) for s in states] == [0, 1, 2, 2, 2]
    assert same(states[0].params, states[4].params)  # though the losses of steps 3, 4 were finite


def test_nonfinite_gradients_are_replaced_and_counted():
    """sqrt at 0 has an infinite derivative: the loss is finite, the gradient is not."""

    class Roots(Objective):
        def loss(self, variables, images, labels, draws, train):
            bias = variables["params"]["out"]["bias"]  # zeros here
            nan = bias[0] * jnp.where(bias[0] == 0, jnp.sqrt(bias[0]) * 0, 1)
            return {"loss": jnp.square(images) * 0 + bias[1] + jnp.sqrt(bias[2]) + nan}

    optimizer = adam(1.0)
    step = fast_jit(make_step(optimizer, Roots(), ema=Ema(10.0)))
    variables = {"params": {"out": {"bias": jnp.zeros(3)}}}
    after, metrics = step(create_state(variables, optimizer), batch(), jax.random.key(0))
    assert float(after.nonfinite_grads) == 2
    assert int(after.skipped_steps) == 0
    moment = after.opt_state[0].mu["out"]["bias"]
    np.testing.assert_allclose(moment, [0, 0.1 * 48, 0.1 * 1e5], rtol=1e-5)
    assert np.isfinite(to_scalars(metrics)["train/grad_norm"])


def test_joined_holds_every_entry_once(monkeypatch):
    monkeypatch.setattr("lora_diffusion_jax.training.step.JOINED", 12)
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.full((3, 4), 7.0), "c": jnp.float32(9)}
    vector, large = joined(tree)
    np.testing.assert_array_equal(vector, [0, 1, 2, 3, 4, 5, 9])
    np.testing.assert_array_equal(large, tree["b"])
    assert joined({"b": tree["b"]}) == [tree["b"]]
    assert joined({}) == []


def test_images_and_labels_are_brought_to_the_networks_ranges():
    u8 = jnp.array([0, 255, 51], jnp.uint8)
    np.testing.assert_allclose(to_float(u8), [-1, 1, -0.6], rtol=1e-6)
    floats = jnp.array([0.25])
    assert to_float(floats) is floats
    np.testing.assert_array_equal(to_labels(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    mixture = jnp.array([[0.5, 0.5, 0.0]])
    assert to_labels(mixture, 3) is mixture
    assert to_labels(jnp.array([2, 0]), 0) is None


def test_images_seen_outgrow_int32():
    optimizer = adam(1e-3)
    state = create_state(init_variables(), optimizer).replace(step=jnp.int32(610_352))
    assert float(state.images_seen(4096)) == pytest.approx(610_352 * 4096, rel=1e-6)
