"""One training step as a pure function of state, batch and key."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Collection
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lora_diffusion_jax.array_types import (
    Images,
    ImagesU8,
    Key,
    LabelIds,
    Labels,
    PyTree,
    Variables,
)
from lora_diffusion_jax.paths import is_adapter, split
from lora_diffusion_jax.training.ema import Ema
from lora_diffusion_jax.training.metrics import DiscreteMetrics, HybridMetrics, TrainMetrics
from lora_diffusion_jax.training.optimizer import Optimizer
from lora_diffusion_jax.training.sharding import check_batch_size, gathered
from lora_diffusion_jax.training.state import TrainState, assemble

Batch = Mapping[str, Array]  # 'image' uint8 or [-1, 1] float [B, H, W, C]; 'label' ids or float
StepFn = Callable[[TrainState, Batch, Key], tuple[TrainState, Collection]]
JOINED = 2**17  # entries of an array that is worth kernels of its own
NORMS = ("grad_norm", "lora_grad_norm", "update_norm", "param_norm")
ImageLosses = dict[str, Float[Array, " B"]]  # 'loss', and its terms if it has several
# (params, part of a batch) -> (gradient, losses per image)
Gradient = Callable[[PyTree, PyTree], tuple[PyTree, ImageLosses]]


class Objective(Protocol):
    """A training loss in two parts: what it draws at random, and its value given the draws."""

    def draw(self, key: Key, shape: tuple[int, ...]) -> Mapping[str, PyTree]:
        """Draws for images of a shape: 'sigma' [B], other arrays with a row per image, keys.

        'quartile' [B], the quartile of a discrete timestep, has the loss logged by quartile.
        """
        ...

    def loss(
        self,
        variables: Variables,
        images: Images,
        labels: Labels | None,
        draws: Mapping[str, PyTree],
        train: bool,
    ) -> dict[str, Float[Array, "B H W C"]]:
        """The loss per pixel of images in [-1, 1], by the terms that it is the sum of.

        A single one is called 'loss'; 'mse' and 'vb' are logged by themselves.
        """
        ...


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    ema: Ema,
    batch_size: int,
    mesh: Mesh,
    num_classes: int = 0,
    microbatch: int | None = None,
    max_bad_steps: int = 20,
    mean_over_pixels: bool = False,
) -> StepFn:
    """Builds (state, batch, key) -> (state, metrics).

    The loss is summed over pixels and averaged over the batch, as in EDM. NaN in a gradient
    becomes 0 and infinities +-1e5, counted. A step whose loss is not finite changes nothing but
    the counters; after max_bad_steps of them in a row nothing changes any more, and the loop stops.

    Args:
        objective: what to minimise.
        optimizer: direction and rate.
        ema: average of the trained parameters.
        batch_size: images of a step over all devices.
        mesh: the devices the step will run on.
        num_classes: integer labels become one-hot of this width; 0: the loss gets no labels.
        microbatch: images of one forward and backward pass over all devices; gradients are
            accumulated. Draws are made for the whole batch, so the result is the full batch's up to
            rounding (dropout apart). None: the batch.
        max_bad_steps: see above.
        mean_over_pixels: averages the loss over pixels too, as improved DDPM does.

    Raises:
        UserError: batch or microbatch do not divide evenly.
    """
    check_batch_size(batch_size, mesh, microbatch)
    chunks = batch_size // (microbatch or batch_size)
    # XLA on CPU runs the gradient of convolutions inside a loop some 20 times slower.
    unroll = mesh.devices.flat[0].platform == "cpu"
    # It also generates several kernels for each array's norm, a tenth of a step's time to compile.
    entries = joined if unroll and mesh.size == 1 else (lambda tree: tree)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Collection]:
        images, seen = to_float(batch["image"]), state.images_seen(batch_size)
        labels = to_labels(batch.get("label"), num_classes)
        draws = objective.draw(key, images.shape)

        def loss(params: PyTree, part: PyTree) -> tuple[Float[Array, ""], ImageLosses]:
            variables = gathered(assemble(params, state.frozen, state.buffers), mesh)
            images, labels, draws = part
            terms = objective.loss(variables, images, labels, draws, True)
            pixels = jax.tree.reduce(operator.add, terms)
            per_image = {
                name: value.mean(axis=(1, 2, 3), dtype=jnp.float32)
                for name, value in {**terms, "loss": pixels}.items()
            }
            # Of the whole batch also in a part, so that the parts' gradients add up.
            count = batch_size * (pixels[0].size if mean_over_pixels else 1)
            return pixels.astype(jnp.float32).sum() / count, per_image

        # The draws are made for the whole batch before it is cut: the size of the parts must not
        # change what is learned.
        gradient, whole = jax.grad(loss, has_aux=True), (images, labels, draws)
        if chunks == 1:
            grads, losses = gradient(state.params, whole)
        else:
            grads, losses = accumulate(gradient, state.params, whole, chunks, unroll)
        means = {name: value.mean() for name, value in losses.items()}
        good = jnp.isfinite(means["loss"]) & ~state.halted

        def update() -> tuple[tuple, dict[str, Array], Array]:
            finite = clean(grads)
            updates, opt_state = optimizer.update(finite, state.opt_state, state.params, seen)
            params = optax.apply_updates(state.params, updates)
            average = ema.update(state.ema, params, seen, batch_size)
            adapters, _ = split(finite, is_adapter)
            trees = map(entries, (finite, adapters, updates, params))
            measured = norms(dict(zip(NORMS, trees, strict=True)))
            return (params, opt_state, average), measured, nonfinite(entries(grads))

        def skip() -> tuple[tuple, dict[str, Array], Array]:
            unknown = dict.fromkeys(NORMS, jnp.float32(0))  # masked below
            return (state.params, state.opt_state, state.ema), unknown, jnp.float32(0)

        # Two branches rather than a choice per array: XLA then generates half as many kernels.
        (params, opt_state, average), measured, replaced = jax.lax.cond(good, update, skip)
        # Once halted it stays as it is: the loop reports it some steps later.
        bad_in_row = jnp.where(good, 0, state.bad_in_row + ~state.halted)
        scalars = {**measured, **means, "learning_rate": optimizer.rate(seen)}
        kind = DiscreteMetrics if "quartile" in draws else TrainMetrics
        metrics = (HybridMetrics if "vb" in losses else kind).single_from_model_output(
            mask=good[None],
            image_losses=losses,
            sigma=draws["sigma"],
            quartile=draws.get("quartile"),
            **{name: value[None] for name, value in scalars.items()},
        )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=average,
            nonfinite_grads=state.nonfinite_grads + replaced,
            skipped_steps=state.skipped_steps + ~good,
            bad_in_row=bad_in_row,
            halted=bad_in_row >= max_bad_steps,
        )
        return state, metrics

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
    gradient: Gradient, params: PyTree, whole: PyTree, chunks: int, unroll: bool
) -> tuple[PyTree, ImageLosses]:
    """Adds up the gradients of equal parts of a batch.

    Part i takes rows i, i + chunks, ...: every device then finds its share of each part among its
    own rows.

    Args:
        gradient: (params, part) -> (gradient, losses per image of the part).
        params: the parameters.
        whole: arrays with a row per image, which are cut, and keys, which are folded with the part's
            number.
        chunks: the number of parts.
        unroll: whether to repeat the program instead of looping in it.

    Returns:
        The sum of the gradients, and the losses per image in the order of the batch.
    """

    def cut(leaf: Array) -> Array:  # [B, ...] -> [chunks, B / chunks, ...]; a key -> chunks keys
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.vmap(jax.random.fold_in, (None, 0))(leaf, jnp.arange(chunks))
        return jnp.moveaxis(leaf.reshape(-1, chunks, *leaf.shape[1:]), 1, 0)

    def body(total: PyTree, part: PyTree) -> tuple[PyTree, ImageLosses]:
        grads, losses = gradient(params, part)
        return jax.tree.map(jnp.add, total, grads), losses

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = jax.tree.map(cut, whole)
    grads, losses = jax.lax.scan(body, zeros, parts, unroll=chunks if unroll else 1)
    # [chunks, b]: row i of part k is image i chunks + k
    return grads, jax.tree.map(lambda rows: rows.T.reshape(-1), losses)


def clean(grads: PyTree) -> PyTree:
    """NaN -> 0, infinities -> +-1e5 (EDM)."""
    return jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)


def nonfinite(grads: PyTree) -> Float[Array, ""]:
    """The number of entries that are NaN or infinite."""
    counts = [jnp.sum(~jnp.isfinite(g), dtype=jnp.float32) for g in jax.tree.leaves(grads)]
    return jnp.stack(counts).sum()


def norms(trees: Mapping[str, PyTree]) -> dict[str, Float[Array, ""]]:
    """The norm of each tree, over all its arrays; NaN, which is not logged, of one without arrays."""
    return {
        name: optax.tree.norm(tree) if jax.tree.leaves(tree) else jnp.float32(jnp.nan)
        for name, tree in trees.items()
    }


def joined(tree: PyTree) -> list[Array]:
    """The entries of a tree in fewer arrays: those below JOINED entries become one vector."""
    small = [leaf.ravel() for leaf in jax.tree.leaves(tree) if leaf.size < JOINED]
    large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= JOINED]
    return [jnp.concatenate(small), *large] if small else large
