"""One training step as a pure function of state, batch and key."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from lora_diffusion_jax.array_types import (
    Images,
    ImagesU8,
    Key,
    LabelIds,
    Labels,
    PyTree,
    Variables,
)
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.feed import take
from lora_diffusion_jax.training.metrics import TrainMetrics
from lora_diffusion_jax.training.optimizer import Optimizer
from lora_diffusion_jax.training.sharding import (
    Rules,
    batch_sharding,
    gathered,
    path_of,
    replicated,
    tree_sharding,
)
from lora_diffusion_jax.training.state import TrainState, assemble, has_adapters

Batch = Mapping[str, Array]  # 'image' uint8 or [-1, 1] float [B, H, W, C]; 'label' ids or float
# Sums of gradient, loss per image and sigma [B]
Gradient = tuple[PyTree, Float[Array, " B"], Float[Array, " B"]]


class LossFn(Protocol):
    """The objective of some images.

    Args of the call: variables; images [B, H, W, C] in [-1, 1]; labels [B, num_classes] or None;
    `random`, what `draw` gave for these images (without `draw`: one key); train, True here.
    Returns (loss per pixel [B, H, W, C], sigma [B] or []).
    """

    def __call__(
        self,
        variables: Variables,
        images: Images,
        labels: Labels | None,
        random: PyTree,
        train: bool,
    ) -> tuple[Float[Array, "B H W C"], Float[Array, " B"]]: ...


# (key, shape of the images) -> arrays with one row per image (sigma, noise, augmentation) and keys
Draw = Callable[[Key, tuple[int, ...]], PyTree]
# What `_sums` adds up
SUMS = ("nonfinite", "grad", "update", "param", "adapter_grad")
StepFn = Callable[[TrainState, Batch, Key], tuple[TrainState, TrainMetrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    ema: Ema,
    batch_size: int,
    num_classes: int = 0,
    microbatch: int | None = None,
    draw: Draw | None = None,
    max_bad_steps: int = 10,
    mesh: Mesh | None = None,
    unroll: bool | None = None,
) -> StepFn:
    """Builds (state, batch, key) -> (state, metrics).

    The loss is summed over pixels and averaged over the batch, as in EDM. NaN in a gradient
    becomes 0 and infinities +-1e5, counted. A step whose loss is not finite changes nothing but
    the counters; after max_bad_steps of them in a row nothing changes any more, and the loop stops.

    Args:
        loss_fn: the objective.
        optimizer: direction and rate.
        ema: average of the trained parameters.
        batch_size: images of a step over all devices.
        num_classes: integer labels become one-hot of this width; 0: the loss gets no labels.
        microbatch: images of one forward and backward pass over all devices; gradients are
            accumulated. With `draw` the result is the full batch's up to rounding (dropout apart).
            None: the batch.
        draw: makes the random numbers of the whole batch before it is cut into microbatches: arrays
            are cut with the images, keys are folded with the microbatch's number. None: loss_fn
            gets the key.
        max_bad_steps: see above.
        mesh: the devices the step will run on, if they are not jax.devices() or split parameters.
        unroll: accumulate in a Python loop instead of a scan. None: on CPU only, where XLA runs the
            gradient of convolutions inside a loop some 20 times slower.

    Raises:
        UserError: the microbatch does not divide the batch.
    """
    if microbatch is not None and (microbatch < 1 or batch_size % microbatch):
        raise UserError(
            f"microbatch {microbatch} does not divide batch_size {batch_size}; take one of "
            f"{[m for m in range(1, batch_size + 1) if batch_size % m == 0]}."
        )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    unroll = platform == "cpu" if unroll is None else unroll
    chunks = batch_size // (microbatch or batch_size)

    def gradient(state: TrainState, part: PyTree) -> Gradient:
        def objective(params: PyTree) -> tuple[Float[Array, ""], tuple]:
            variables = gathered(assemble(params, state.frozen, state.buffers), mesh)
            pixels, sigma = loss_fn(variables, part["image"], part["label"], part["random"], True)
            total = pixels.astype(jnp.float32).sum() / batch_size
            sigma = jnp.broadcast_to(sigma, pixels.shape[:1])
            return total, (pixels.mean(axis=(1, 2, 3), dtype=jnp.float32), sigma)

        grads, (image_loss, sigma) = jax.grad(objective, has_aux=True)(state.params)
        return grads, image_loss, sigma

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, TrainMetrics]:
        images = to_float(batch["image"])
        whole = {
            "image": images,
            "label": to_labels(batch.get("label"), num_classes),
            "random": key if draw is None else draw(key, images.shape),
        }
        grads, image_loss, sigma = accumulate(
            functools.partial(gradient, state), whole, chunks=chunks, unroll=unroll
        )
        return _apply(state, grads, image_loss, sigma, optimizer, ema, batch_size, max_bad_steps)

    return step


def to_float(images: Images | ImagesU8) -> Images:
    """uint8 [0, 255] -> float32 [-1, 1]; floats pass."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    return images


def to_labels(labels: LabelIds | Labels | None, num_classes: int) -> Labels | None:
    """Class ids -> one-hot; float labels (mixtures) pass; None without classes."""
    if num_classes == 0 or labels is None:
        return None
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, num_classes)
    return labels


def accumulate(
    gradient: Callable[[PyTree], Gradient], whole: PyTree, *, chunks: int, unroll: bool
) -> Gradient:
    """Adds up the gradients of `chunks` equal parts of a batch.

    Part i takes rows i, i + chunks, ...: every device then finds its share of each part among its
    own rows.
    """
    if chunks == 1:
        return gradient(whole)

    def cut(leaf: Array) -> Array:  # [B, ...] -> [chunks, B / chunks, ...]; a key -> chunks keys
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.vmap(jax.random.fold_in, (None, 0))(leaf, jnp.arange(chunks))
        return jnp.moveaxis(leaf.reshape(-1, chunks, *leaf.shape[1:]), 1, 0)

    parts = jax.tree.map(cut, whole)
    if unroll:
        results = [gradient(jax.tree.map(lambda p, i=i: p[i], parts)) for i in range(chunks)]
        grads = jax.tree.map(lambda *g: sum(g), *[r[0] for r in results])
        return grads, *(jnp.concatenate([r[j] for r in results]) for j in (1, 2))

    def body(total: PyTree, part: PyTree) -> tuple[PyTree, tuple]:
        grads, *rows = gradient(part)
        return jax.tree.map(jnp.add, total, grads), rows

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda p: p[0], parts))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    grads, rows = jax.lax.scan(body, zeros, parts)
    return grads, *(row.reshape(-1) for row in rows)


def clean(grads: PyTree) -> PyTree:
    """NaN -> 0, infinities -> +-1e5 (EDM)."""
    return jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)


def _apply(
    state: TrainState,
    grads: PyTree,
    image_loss: Float[Array, " B"],
    sigma: Float[Array, " B"],
    optimizer: Optimizer,
    ema: Ema,
    batch_size: int,
    max_bad_steps: int,
) -> tuple[TrainState, TrainMetrics]:
    """The state after an update with these gradients, or as it was where the loss is not finite."""
    loss, seen = image_loss.mean(), state.images_seen(batch_size)
    good = jnp.isfinite(loss) & ~state.halted
    # Two branches rather than a choice per array: XLA then makes half as many kernels.
    params, opt_state, average, rate, sums = jax.lax.cond(
        good,
        lambda: _moved(state, grads, seen, optimizer, ema, batch_size),
        lambda: _unmoved(state, optimizer.rate(seen)),
    )
    measured = TrainMetrics.single_from_model_output(
        mask=good[None],
        loss=loss[None],
        image_loss=image_loss,
        sigma=sigma,
        grad_norm=jnp.sqrt(sums["grad"])[None],
        lora_grad_norm=jnp.sqrt(sums["adapter_grad"])[None],
        param_norm=jnp.sqrt(sums["param"])[None],
        update_norm=jnp.sqrt(sums["update"])[None],
        learning_rate=rate[None],
    )
    state = _count(state, good, sums["nonfinite"], max_bad_steps)
    return state.replace(params=params, opt_state=opt_state, ema=average), measured


# Parameters, moments, average, rate, sums
Outcome = tuple[PyTree, PyTree, PyTree, Float[Array, ""], dict[str, Array]]


def _moved(
    state: TrainState,
    grads: PyTree,
    seen: Float[Array, ""],
    optimizer: Optimizer,
    ema: Ema,
    batch_size: int,
) -> Outcome:
    """What an update with these gradients leads to."""
    finite = clean(grads)
    updates, opt_state, rate = optimizer.update(finite, state.opt_state, state.params, seen)
    params = optax.apply_updates(state.params, updates)
    average = ema.update(state.ema, params, seen, batch_size)
    return params, opt_state, average, rate, _sums(grads, finite, updates, params)


def _unmoved(state: TrainState, rate: Float[Array, ""]) -> Outcome:
    """The same of a step that is skipped."""
    sums = dict.fromkeys(SUMS, jnp.float32(0))  # masked, all but the next
    sums["param"] = jnp.square(optax.tree.norm(state.params))
    return state.params, state.opt_state, state.ema, rate, sums


def _count(
    state: TrainState, good: Bool[Array, ""], replaced: Float[Array, ""], max_bad_steps: int
) -> TrainState:
    """The state with its counters moved on by one step."""
    row = jnp.where(good, 0, state.bad_in_row + 1)
    row = jnp.where(state.halted, state.bad_in_row, row)
    return state.replace(
        step=state.step + 1,
        nonfinite_grads=state.nonfinite_grads + jnp.where(good, replaced, 0),
        skipped_steps=state.skipped_steps + (~good),
        bad_in_row=row,
        halted=row >= max_bad_steps,
    )


def _sums(raw: PyTree, grads: PyTree, updates: PyTree, params: PyTree) -> dict[str, Array]:
    """Entries of `raw` that are not finite, and sums of squares of the rest, over all arrays.

    The adapters' gradients are summed once more; NaN, which is not logged, when there are none.
    One reduction with four results per array, instead of four.
    """
    total = dict.fromkeys(SUMS[:4], jnp.float32(0))
    adapters = []
    trees = [jax.tree.leaves(tree) for tree in (grads, updates, params)]
    for (path, g), *squared in zip(jax.tree_util.tree_leaves_with_path(raw), *trees, strict=True):
        bad = (~jnp.isfinite(g)).astype(jnp.float32)
        terms = (bad, *(jnp.square(x.astype(jnp.float32)) for x in squared))
        sums = jax.lax.reduce(terms, (jnp.float32(0),) * 4, _add_each, range(g.ndim))
        total = {name: total[name] + s for name, s in zip(total, sums, strict=True)}
        if has_adapters([path_of(path)]):
            adapters.append(sums[1])
    return total | {"adapter_grad": sum(adapters) if adapters else jnp.float32(jnp.nan)}


def _add_each(one: Sequence[Array], other: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def lower_step(
    step_fn: StepFn,
    state: TrainState,
    interval: TrainMetrics,
    data: PyTree,
    item: PyTree,
    key: Key,
    mesh: Mesh,
    rules: Rules = (),
) -> jax.stages.Lowered:
    """Lowers (state, interval, data, item, key) -> (state, interval, status [4]); shapes will do.

    One program gathers the batch, folds the step into the key, steps, and adds to the metrics; the
    first two arguments are donated. The item holds besides the batch `stop`, int32 [devices]: the
    signals that processes were told to stop by, or 0. status: loss of the step (NaN if skipped),
    bad steps in a row, halted, the greatest signal; so all processes learn of it at the same step,
    and no communication is spent on it.
    """

    def one(state: TrainState, interval: TrainMetrics, data: PyTree, item: PyTree, key: Key):
        batch = {name: rows for name, rows in item.items() if name != "stop"}
        batch = take(data, batch)
        state, measured = step_fn(state, batch, jax.random.fold_in(key, state.step))
        status = jnp.stack(
            [
                measured.loss.compute(),
                state.bad_in_row.astype(jnp.float32),
                state.halted.astype(jnp.float32),
                item["stop"].max().astype(jnp.float32),
            ]
        )
        return state, interval.merge(measured), status

    layout, whole = tree_sharding(state, mesh, rules), replicated(mesh)
    jitted = jax.jit(
        one,
        in_shardings=(layout, whole, whole, batch_sharding(mesh), whole),
        out_shardings=(layout, whole, whole),
        donate_argnums=(0, 1),
    )
    return jitted.lower(state, interval, data, item, key)
