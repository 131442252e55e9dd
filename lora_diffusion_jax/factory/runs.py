"""Data, mesh, optimizer, step and schedule of a run; saved runs opened again."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import generate, interop, lora
from lora_diffusion_jax.data import image_source, pipeline, sources
from lora_diffusion_jax.default_config import base as default_config
from lora_diffusion_jax.diffusion import precond
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import choose
from lora_diffusion_jax.factory.networks import (
    architecture_from_config,
    build_denoiser,
    config_from_architecture,
    image_shape,
    num_labels,
)
from lora_diffusion_jax.factory.objectives import build_objective, build_sampler
from lora_diffusion_jax.models import unet
from lora_diffusion_jax.training import (
    checkpoint,
    ema,
    loop,
    optimizer,
    sharding,
    state,
    step,
    workdir,
)


def open_source(config: ConfigDict) -> image_source.ImageSource:
    """The training images of `config.data`.

    Raises:
        UserError: they cannot be opened; the message says what was looked for and where.
    """
    d = config.data
    if not (d.name or d.path):
        raise UserError(
            "No data set is named: set --config.data.name (a TFDS data set) or --config.data.path "
            "(a folder or ZIP of images)."
        )
    return sources.open_source(d.name, d.data_dir, d.path, d.split, class_folders=d.class_folders)


def open_heldout(config: ConfigDict) -> image_source.ImageSource | None:
    """Real images that training does not see; None for a folder or ZIP without data.eval_path."""
    d = config.data
    if d.name:
        return sources.open_source(d.name, d.data_dir, "", d.eval_split)
    if d.eval_path:
        return sources.open_source(path=d.eval_path, class_folders=d.class_folders)
    return None


def complete(config: ConfigDict, source: image_source.ImageSource) -> ConfigDict:
    """The config with the sizes of its data set filled in.

    Raises:
        UserError: a size that the config states differs from the data set's, the images do not
            suit the U-Net, or classes are wanted but there are none.
    """
    height, width, channels = source.image_shape
    config = config.copy_and_resolve_references()
    found = {"image_size": height, "image_width": width, "channels": channels}
    if config.class_conditional:
        found["num_classes"] = source.num_classes
    with config.unlocked():
        config.data.image_width = config.data.image_width or config.data.image_size  # square
        for field, value in found.items():
            if config.data[field] not in (0, value):
                raise UserError(
                    f"The config says data.{field}={config.data[field]}, but {source.title} has "
                    f"{value}. Set --config.data.{field}={value} or choose another data set."
                )
            config.data[field] = value
        config.data.fingerprint = source.fingerprint()
    num_labels(config)
    images = jax.ShapeDtypeStruct((1, *source.image_shape), "float32")
    unet.check_input(images, config.model.channel_mult, channels, config.model.name)
    return config


def build_batches(
    config: ConfigDict, source: image_source.ImageSource, mesh: Mesh
) -> pipeline.Batches:
    """The training batches, of each the rows that this process's devices hold."""
    return pipeline.Batches(
        source,
        config.train.batch_size,
        config.train.seed,
        rows=sharding.local_rows(config.train.batch_size, mesh),
        memory_limit=int(config.data.memory_limit_gib * 2**30),
        num_workers=config.data.workers,
    )


def build_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the devices; None: all there are."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)


def build_optimizer(config: ConfigDict) -> optimizer.Optimizer:
    """Adam with EDM's ramp-up."""
    train = config.train
    return optimizer.adam(train.learning_rate, rampup_images=train.rampup_images)


def build_step(
    config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh | None = None
) -> step.StepFn:
    """The training step of a config for a mesh; None: one that splits no parameter."""
    train, objective = config.train, build_objective(config, denoiser)
    return step.make_train_step(
        objective.loss,
        build_optimizer(config),
        ema=ema.Ema(train.ema_halflife_images, train.ema_rampup_ratio),
        batch_size=train.batch_size,
        num_classes=num_labels(config),
        microbatch=train.microbatch or None,
        draw=objective.draw,
        max_bad_steps=train.max_nonfinite,
        mesh=mesh,
    )


def build_schedule(config: ConfigDict) -> loop.Schedule:
    """When the loop logs, saves, samples and evaluates."""
    train = config.train
    return loop.Schedule(
        total_images=train.total_images,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        sample_every=train.sample_every or train.total_images,
        eval_every=train.eval_every or train.total_images,
        keep=train.keep,
    )


def trainable(config: ConfigDict) -> Callable[[str], bool]:
    """Path of a parameter -> is it trained: all, or the adapters alone."""
    if config.train.freeze_base:
        return lambda path: lora.params.is_adapter(tuple(path.split("/")))
    return lambda path: True


def build_generator(
    config: ConfigDict, denoiser: precond.Denoiser, mesh: Mesh
) -> generate.Generator:
    """Draws images from a denoiser with `config.sampler`."""
    return generate.Generator(
        apply=denoiser.apply,
        sampler=build_sampler(config, denoiser),
        image_shape=image_shape(config),
        num_classes=num_labels(config),
        mesh=mesh,
        batch_size=config.sampler.batch_size,
    )


def load_workdir(
    path: str | os.PathLike, *, weights: str = "ema", at_step: int | None = None
) -> interop.Pretrained:
    """The network of a run: denoiser, variables (numpy), config.

    Args:
        path: the run's directory.
        weights: ema, or raw for the network as the last step left it.
        at_step: which checkpoint; None: the newest.

    Raises:
        UserError: it is not a run, or has no such checkpoint.
    """
    config = config_from_dict(workdir.read_config(path))
    step_read, saved = checkpoint.open_for_reading(path, at_step)
    assemble = choose("weights", weights, {"ema": state.ema_variables, "raw": state.raw_variables})
    variables = assemble(saved)
    return interop.Pretrained(build_denoiser(config, variables), variables, config, step_read)


def config_of(loaded: interop.Pretrained) -> ConfigDict:
    """The config of a loaded network; UserError says what no config expresses."""
    if loaded.config is None:
        return config_from_architecture(loaded.architecture)
    return loaded.config


def with_config(loaded: interop.Pretrained, config: ConfigDict) -> interop.Pretrained:
    """The same weights under an overridden config: sampler, mesh, dtype, or LoRA off.

    Raises:
        UserError: a field was changed that decides which weights there are.
    """
    old, new = (architecture_from_config(c) for c in (loaded.config, config))
    if config.lora.mode == "baseline" and old["use_affine"]:
        new["lora"] = old["lora"]  # the base alone, which is among the weights
    old["sites"], new["sites"] = loaded.config.lora.sites, config.lora.sites
    free = ("dropout", "label_dropout")
    changed = [k for k in old if old[k] != new[k] and k not in free]
    if image_shape(loaded.config)[:2] != image_shape(config)[:2]:
        changed.append("image size")
    if changed:
        told = ", ".join(f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in changed)
        raise UserError(
            f"These weights belong to another network than the config describes: {told}. Leave out "
            "these overrides; sampler, mesh and dtype can be changed, and lora.mode to baseline."
        )
    return dataclasses.replace(
        loaded, denoiser=build_denoiser(config, loaded.variables), config=config
    )


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
    """A config from its JSON form: lists become tuples, fields that are newer take their defaults.

    Raises:
        UserError: a field that this version does not have.
    """
    config = default_config()
    unknown = _update(config, saved, "")
    if unknown:
        raise UserError(
            f"The saved config has fields that this version does not know: {', '.join(unknown)}. "
            "It was written by another version; use that one."
        )
    return config


def _update(config: ConfigDict, saved: dict[str, Any], prefix: str) -> list[str]:
    unknown = []
    for key, value in saved.items():
        if key not in config:
            unknown.append(prefix + key)
        elif isinstance(value, dict):
            unknown += _update(config[key], value, f"{prefix}{key}.")
        else:
            config[key] = tuple(value) if isinstance(value, list) else value
    return unknown
