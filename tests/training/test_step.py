import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.metrics import to_scalars
from lora_diffusion_jax.training.optimizer import Optimizer, adam
from lora_diffusion_jax.training.state import (
    create_state,
    ema_variables,
    raw_variables,
    split,
)
from lora_diffusion_jax.training.step import to_float, to_labels
from tests.training.stand_in import (
    BATCH,
    CLASSES,
    draw,
    init_variables,
    loss_fn,
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
    after, metrics = jax.jit(make_step(descent))(state, data, key)
    images = np.asarray(data["image"]) / np.float32(127.5) - 1
    labels = np.eye(CLASSES, dtype=np.float32)[np.asarray(data["label"])]
    random = draw(key, images.shape)

    def mean_loss(params):
        return loss_fn({"params": params}, images, labels, random, True)[0].mean()

    pixels = np.prod(images.shape[1:])
    value, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    moved = jax.tree.map(lambda a, b: (a - b) / pixels, state.params, after.params)
    # Differences of weights near 1 in float32, divided by 48.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, grads)
    assert to_scalars(metrics)["train/loss"] == pytest.approx(
        float(mean_loss(state.params)), rel=1e-6
    )


@pytest.mark.parametrize(("chunks", "unroll"), [(4, True), (2, False)])
def test_accumulated_gradients_equal_the_full_batch(variables, chunks, unroll):
    optimizer = adam(1e-3)
    state = create_state(variables, optimizer)
    full = jax.jit(make_step(optimizer))
    parts = jax.jit(make_step(optimizer, microbatch=BATCH // chunks, unroll=unroll))
    a = b = state
    for step in range(3):
        key = jax.random.key(step)
        (a, measured_a), (b, measured_b) = full(a, batch(step), key), parts(b, batch(step), key)
    first = full(state, batch(0), jax.random.key(0))[0]
    second = parts(state, batch(0), jax.random.key(0))[0]
    mu = [s.opt_state[0].mu for s in (first, second)]
    scale = max(float(jnp.abs(m).max()) for m in jax.tree.leaves(mu[0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * scale), *mu)
    # Adam divides by the root of the second moment, which magnifies the rounding of tiny gradients.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), a.params, b.params
    )
    for name, value in to_scalars(measured_a).items():
        assert to_scalars(measured_b)[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("microbatch", [0, 3, 32])
def test_a_microbatch_that_does_not_divide_is_refused(microbatch):
    with pytest.raises(UserError, match=rf"microbatch {microbatch} .*\[1, 2, 4, 8, 16\]"):
        make_step(adam(1e-3), microbatch=microbatch)


def test_microbatches_without_draw_get_keys_of_their_own(variables):
    seen = []

    def spy(variables, images, labels, key, train):
        jax.debug.callback(lambda k: seen.append(k.tobytes()), jax.random.key_data(key))
        return jnp.square(images) * variables["params"]["out"]["bias"], jnp.ones(())

    optimizer = adam(1e-3)
    step = make_step(optimizer, loss_fn=spy, draw=None, microbatch=BATCH // 4)
    jax.block_until_ready(
        jax.jit(step)(create_state(variables, optimizer), batch(), jax.random.key(0))
    )
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_frozen_weights_have_neither_moments_nor_average_and_stay(variables):
    optimizer = adam(1e-2)
    variables = {**variables, "buffers": {"freqs": jnp.arange(3.0)}}
    state = create_state(variables, optimizer, lambda path: "lora" in path.split("/"))
    step = jax.jit(make_step(optimizer))
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
    with pytest.raises(UserError, match="batch_stats"):
        create_state({**variables, "batch_stats": {}}, adam(1e-3))


def poisoned(bad_from, bad_to, value=jnp.nan):
    """A loss that is not finite while the weights' own step count says so: labels carry it."""

    def loss(variables, images, labels, random, train):
        pixels, sigma = loss_fn(variables, images, labels, random, train)
        bad = (random["step"] >= bad_from) & (random["step"] < bad_to)
        return jnp.where(bad[:, None, None, None], value, pixels), sigma

    return loss


def draw_with_step(key, shape):
    # The test's keys are key(step): the step is read back out of the key.
    return {**draw(key, shape), "step": jnp.full(shape[0], jax.random.key_data(key)[-1])}


def test_a_bad_loss_changes_nothing_but_the_counters(variables):
    optimizer = adam(1e-2)
    step = jax.jit(make_step(optimizer, loss_fn=poisoned(1, 3, jnp.inf), draw=draw_with_step))
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
    loss = poisoned(1, 3)
    step = jax.jit(make_step(optimizer, loss_fn=loss, draw=draw_with_step, max_bad_steps=2))
    state = create_state(variables, optimizer)
    states = [state := step(state, batch(), jax.random.key(k))[0] for k in range(5)]
    assert [bool(s.halted) for s in states] == [False, False, True, True, True]
    assert [int(s.bad_in_row) for s in states] == [0, 1, 2, 2, 2]
    assert same(states[0].params, states[4].params)  # though the losses of steps 3, 4 were finite


def test_nonfinite_gradients_are_replaced_and_counted():
    """sqrt at 0 has an infinite derivative: the loss is finite, the gradient is not."""

    def loss(variables, images, labels, random, train):
        bias = variables["params"]["out"]["bias"]  # zeros here
        nan = bias[0] * jnp.where(bias[0] == 0, jnp.sqrt(bias[0]) * 0, 1)
        pixels = jnp.square(images) * 0 + bias[1] + jnp.sqrt(bias[2]) + nan
        return pixels, jnp.ones(())

    optimizer = adam(1.0)
    step = jax.jit(make_step(optimizer, loss_fn=loss, ema=Ema(10.0)))
    variables = {"params": {"out": {"bias": jnp.zeros(3)}}}
    after, metrics = step(create_state(variables, optimizer), batch(), jax.random.key(0))
    assert float(after.nonfinite_grads) == 2
    assert int(after.skipped_steps) == 0
    moment = after.opt_state[0].mu["out"]["bias"]
    np.testing.assert_allclose(moment, [0, 0.1 * 48, 0.1 * 1e5], rtol=1e-5)
    assert np.isfinite(to_scalars(metrics)["train/grad_norm"])


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
