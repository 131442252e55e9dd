"""Data sets of a config, and the config completed with what its data set has."""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_diffusion_jax import files
from lora_diffusion_jax.data import image_source, pipeline, sources
from lora_diffusion_jax.data.numpy_source import is_array
from lora_diffusion_jax.errors import NotThereError, UserError, printable
from lora_diffusion_jax.factory.networks import check_attention, num_classes
from lora_diffusion_jax.models.unet import check_image_size
from lora_diffusion_jax.training import sharding


def open_source(config: ConfigDict) -> image_source.ImageSource:
    """The training images of `config.data`.

    Raises:
        UserError: no data set is named, or it cannot be opened.
    """
    d = config.data
    if not (d.name or d.path):
        raise NotThereError(
            "No data set is named: set --config.data.name (a TFDS data set, or hf:OWNER/NAME of Hugging "
            "Face) or --config.data.path (a folder or ZIP of images, or an array: .npy, .npz)."
        )
    data_dir, path = (files.expand(d[name], f"data.{name}") for name in ("data_dir", "path"))
    return sources.open_source(
        d.name,
        data_dir,
        path,
        d.split,
        class_folders=d.class_folders,
        background=d.background,
        image_key=d.image_key,
        label_key=d.label_key,
        layout=d.layout,
        mean=d.mean,
        std=d.std,
    )


def open_heldout(config: ConfigDict, labels: bool = False) -> image_source.ImageSource | None:
    """Held-out images that training never sees: those of data.eval_path, or else the named data set's own.

    None for a folder or ZIP without data.eval_path.

    Args:
        config: of the run.
        labels: whether a folder's or ZIP's labels are needed; images alone may lie without class folders.
    """
    d = config.data
    if d.eval_path:
        path = files.expand(d.eval_path, "data.eval_path")
        array = {"layout": d.layout, "mean": d.mean, "std": d.std} if is_array(path) else {}
        return sources.open_source(
            path=path, class_folders=d.class_folders and labels, background=d.background, **array
        )
    if d.name:
        data_dir = files.expand(d.data_dir, "data.data_dir")
        return sources.open_source(
            d.name,
            data_dir,
            "",
            d.eval_split,
            background=d.background,
            image_key=d.image_key,
            label_key=d.label_key,
        )
    return None


def complete(config: ConfigDict, source: image_source.ImageSource) -> ConfigDict:
    """The config with the sizes and the fingerprint of its data set filled in.

    Raises:
        UserError: the config states another size or other classes than the data set has, the image
            size does not fit the U-Net's levels, attention is asked for at a level that does not exist,
            or class_conditional is set and the data set has no classes, or classes without images.
    """
    height, width, channels = source.image_shape
    config = config.copy_and_resolve_references()
    found: dict[str, Any] = {"image_size": height, "image_width": width, "channels": channels}
    found["floats"] = source.dtype.kind == "f"
    if config.class_conditional:
        check_classes(source)
        found["num_classes"] = source.num_classes
        found["class_names"] = named_classes(source)
    with config.unlocked():
        config.data.image_width = config.data.image_width or config.data.image_size  # 0: square
        for field, value in found.items():
            if config.data[field] not in (0, (), value):
                raise UserError(
                    f"The config says data.{field}={_shown(config.data[field])}, but {source.title} has "
                    f"{_shown(value)}. Set --config.data.{field}={_shown(value)} or choose another data set."
                )
            config.data[field] = value
        config.data.fingerprint = source.fingerprint()
    num_classes(config)
    check_image_size(height, width, len(config.model.channel_mult))
    check_attention(config)
    return config


def check_classes(source: image_source.ImageSource) -> None:
    """Raises UserError if there are no classes, or one has no images: some samples would be of it."""
    if not source.num_classes:
        raise UserError(
            f"class_conditional=True needs labels, but {source.title} has none ({source.label_origin}). "
            "Set --config.class_conditional=False, or add labels to the data."
        )
    empty = source.empty_classes()
    if empty:
        raise UserError(
            f"Class {empty[0]} of {source.title} has no images ({len(empty):,} of {source.num_classes:,} "
            f"classes; labels come from {source.label_origin}), so a network could not learn it. Number "
            "the classes that there are from 0 without gaps, or set --config.class_conditional=False."
        )


def named_classes(source: image_source.ImageSource) -> tuple[str, ...]:
    """The names of the classes; () where each is only its number."""
    numbers = map(str, range(source.num_classes))
    return () if list(source.class_names) == list(numbers) else tuple(source.class_names)


def _shown(value: Any) -> str:
    """A value of a config field as the command line takes it, if it is short."""
    if isinstance(value, tuple):
        return printable(",".join(map(str, value)))
    return str(value)


def build_batches(
    config: ConfigDict, source: image_source.ImageSource, mesh: Mesh
) -> pipeline.Batches:
    """The training batches; each process reads the rows that its own devices hold."""
    return pipeline.Batches(
        source,
        config.train.batch_size,
        config.train.seed,
        rows=sharding.local_rows(config.train.batch_size, mesh),
        memory_limit=int(config.data.memory_limit_gib * 2**30),
        num_workers=config.data.workers,
    )
