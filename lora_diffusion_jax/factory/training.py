"""Mesh, optimizer, step, cadence and sample generator of a config."""

from collections.abc import Callable, Sequence

import jax
from clu.metrics import Collection
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import generate
from lora_diffusion_jax.diffusion import precond
from lora_diffusion_jax.factory.networks import image_shape, num_classes
from lora_diffusion_jax.factory.objectives import build_objective, build_sampler
from lora_diffusion_jax.paths import is_adapter
from lora_diffusion_jax.training import ema, loop, metrics, optimizer, sharding, step


def build_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp) mesh of some devices; None: of all."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)


def build_optimizer(config: ConfigDict) -> optimizer.Optimizer:
    """Adam with EDM's ramp-up."""
    train = config.train
    return optimizer.adam(train.learning_rate, rampup_images=train.rampup_images)


def build_step(config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh) -> step.StepFn:
    """The training step of a config for a mesh."""
    train = config.train
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


def measured(denoiser: precond.Denoiser) -> type[Collection]:
    """What the training step of a network measures."""
    discrete = isinstance(denoiser.precond, precond.DDPM)
    return metrics.DiscreteMetrics if discrete else metrics.TrainMetrics


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
    """A function of a parameter's path: whether it is trained. freeze_base trains adapters alone."""
    if config.train.freeze_base:
        return is_adapter
    return lambda path: True


def build_generator(
    config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh
) -> generate.Generator:
    """The generator that samples a denoiser with `config.sampler`."""
    return generate.Generator(
        denoiser=denoiser,
        sampler=build_sampler(config, denoiser),
        image_shape=image_shape(config),
        num_classes=num_classes(config),
        mesh=mesh,
        batch_size=config.sampler.batch_size,
    )
