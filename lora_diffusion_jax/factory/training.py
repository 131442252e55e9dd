"""Mesh, optimizer, step, cadence and sample generator of a config."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu.metrics import Collection
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import generate
from lora_diffusion_jax.array_types import PyTree
from lora_diffusion_jax.diffusion import precond
from lora_diffusion_jax.diffusion.samplers import to_uint8
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.guidance import build_bind
from lora_diffusion_jax.factory.networks import (
    for_mesh,
    image_shape,
    init_variables,
    is_class_pair,
    num_classes,
)
from lora_diffusion_jax.factory.objectives import build_objective, build_sampler
from lora_diffusion_jax.paths import is_adapter, path_of
from lora_diffusion_jax.training import ema, feed, loop, metrics, optimizer, sharding, state, step

# Images of a batch from which folding pays off: it costs what the adapters do on one or two images.
FOLD_FROM = 2


def build_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp) mesh of some devices; None: of all.

    Raises:
        UserError: the sizes do not fit the devices, or these cannot compute in the config's dtype.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    if config.dtype == "float16" and mesh.devices.flat[0].platform == "cpu":
        raise UserError(
            "dtype is float16, which XLA does not support on a CPU; use float32 or bfloat16, or a GPU."
        )
    return mesh


def build_optimizer(config: ConfigDict) -> optimizer.Optimizer:
    """Adam with EDM's ramp-up, for the new classes alone if `train.new_classes` says so."""
    train = config.train
    restrict = functools.partial(_to_new_classes, config) if train.new_classes else None
    return optimizer.adam(train.learning_rate, rampup_images=train.rampup_images, restrict=restrict)


def _to_new_classes(config: ConfigDict, pairs: PyTree) -> PyTree:
    """Zeros in the places of all but the last `train.new_classes` classes.

    Args:
        config: of the run.
        pairs: an array for each parameter of the ClassLoRA pairs, whose inner channel is class * rank + r.
    """
    first = (num_classes(config) - config.train.new_classes) * config.lora.rank

    def restrict(path: tuple, value: jax.Array) -> jax.Array:
        inner = value.ndim - 1 if path_of(path).endswith("/down/kernel") else 0
        return jnp.where(jax.lax.broadcasted_iota(int, value.shape, inner) >= first, value, 0)

    return jax.tree_util.tree_map_with_path(restrict, pairs)


def build_step(config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh) -> step.StepFn:
    """The training step of a config for a mesh."""
    train, denoiser = config.train, for_mesh(denoiser, mesh, train=True)
    return step.make_train_step(
        build_objective(config, denoiser),
        build_optimizer(config),
        ema=ema.Ema(train.ema_halflife_images, train.ema_rampup_ratio or None),
        batch_size=train.batch_size,
        mesh=mesh,
        num_classes=num_classes(config),
        microbatch=train.microbatch or None,
        max_bad_steps=train.max_nonfinite,
        mean_over_pixels=isinstance(denoiser.precond, precond.DDPM),
    )


def metrics_type(denoiser: precond.Denoiser) -> type[Collection]:
    """What the training step of a network measures."""
    if not isinstance(denoiser.precond, precond.DDPM):
        return metrics.TrainMetrics
    hybrid = denoiser.precond.loss == "hybrid"
    return metrics.HybridMetrics if hybrid else metrics.DiscreteMetrics


def step_arguments(
    config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh, num_images: int = 0
) -> tuple[Any, ...]:
    """Shapes of what `loop.jit_step` takes: (state, interval, data, item, key); nothing is computed.

    Args:
        config: of a run.
        denoiser: its network.
        mesh: the devices.
        num_images: of the data set, which lies on the devices if it is small; 0: it is streamed.
    """

    def rows(count: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((count, *image_shape(config)), jnp.uint8), jnp.zeros(count, jnp.int32)

    def arguments() -> tuple[Any, ...]:
        variables = init_variables(config, denoiser, jax.random.key(0))
        start = state.create_state(variables, build_optimizer(config), trainable(config))
        images, labels = rows(config.train.batch_size)
        data: feed.DeviceDataset | dict = {}
        item = {"image": images, "label": labels}
        limit = min(feed.DEVICE_BYTES, int(config.data.memory_limit_gib * 2**30))
        if 0 < num_images * math.prod(image_shape(config)) <= limit:
            data, item = feed.DeviceDataset.of(*rows(num_images)), {"index": labels}
        item["signal"] = jnp.zeros(mesh.size, jnp.int32)
        return start, metrics_type(denoiser).empty(), data, item, jax.random.key(0)

    return jax.eval_shape(arguments)


def build_cadence(config: ConfigDict) -> loop.Cadence:
    """When the loop logs, saves, samples and evaluates, in images."""
    train = config.train
    return loop.Cadence(
        total_images=train.total_images,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        sample_every=train.sample_every or train.total_images,
        eval_every=train.eval_every or train.total_images,
        keep=train.keep,
    )


def trainable(config: ConfigDict) -> Callable[[str], bool]:
    """A function of a parameter's path: whether it is trained.

    freeze_base trains adapters alone; with new_classes, of these the pairs of ClassLoRA.
    """
    if config.train.new_classes:
        return is_class_pair(config)
    if config.train.freeze_base:
        return is_adapter
    return lambda path: True


def build_generator(
    config: ConfigDict,
    denoiser: precond.Denoiser,
    mesh: Mesh,
    weaker: precond.Denoiser | None = None,
) -> generate.Generator:
    """The generator that samples a denoiser with `config.sampler`, guided by a weaker one if it says so."""
    finish = to_uint8
    if config.data.floats:
        finish = functools.partial(generate.to_values, config.data.mean, config.data.std)
    return generate.Generator(
        denoiser=for_mesh(denoiser, mesh, train=False),
        sampler=build_sampler(config, denoiser),
        image_shape=image_shape(config),
        num_classes=num_classes(config),
        mesh=mesh,
        batch_size=config.sampler.batch_size,
        bind=build_bind(config, weaker),
        bind_shared=build_bind(config, weaker, fold=folds(config)),
        finish=finish,
    )


def folds(config: ConfigDict) -> bool:
    """Whether sampling folds the adapters where all images of a batch have one condition."""
    if config.lora.mode == "baseline" or config.guidance.name != "none":
        return False
    fold = config.sampler.get("fold", "auto")
    return fold == "on" or (fold == "auto" and config.sampler.batch_size >= FOLD_FROM)
