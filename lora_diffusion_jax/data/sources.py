"""One entrance to all image data: a TFDS name, or a folder or ZIP of images."""

from lora_diffusion_jax.data.image_source import ImageSource, describe, format_description
from lora_diffusion_jax.data.sources_files import open_files
from lora_diffusion_jax.data.sources_tfds import open_tfds
from lora_diffusion_jax.errors import UserError

__all__ = ["ImageSource", "describe", "fingerprint", "format_description", "open_source"]


def open_source(
    name: str = "",
    data_dir: str = "",
    path: str = "",
    split: str = "train",
    *,
    class_folders: bool = False,
) -> ImageSource:
    """Opens a data set of images that all have one size.

    Args:
        name: a TFDS data set, such as 'digits' (prepared on the spot) or 'cifar10' (prepared
            beforehand as array_record).
        data_dir: where TFDS data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        path: instead of name, a folder or ZIP of images; see sources_files.open_files.
        split: a TFDS split or slice, such as 'test' or 'train[:90%]'; a path has only 'train',
            which is all of it.
        class_folders: with path, take each image's first folder as its class.

    Returns:
        The source. Its attributes and methods are those of data.base.ImageSource.

    Raises:
        UserError: neither or both of name and path, or what the two openers refuse.
    """
    if bool(name) == bool(path):
        found = f"data.name={name!r} and data.path={path!r}" if name else "neither"
        raise UserError(
            f"expected one of data.name (a TFDS data set) and data.path (a folder or "
            f"ZIP of images); found {found}."
        )
    if name:
        if class_folders:
            raise UserError(
                "data.class_folders needs data.path: a TFDS data set has its own labels."
            )
        return open_tfds(name, data_dir=data_dir, split=split)
    if split != "train":
        raise UserError(
            f"data.path has no split {split!r}, only 'train', which is all of it. "
            "Put other images into another folder or ZIP and name that."
        )
    return open_files(path, class_folders=class_folders)


def fingerprint(source: ImageSource) -> str:
    """Returns 32 hex digits that identify a data set's content, wherever it lies."""
    return source.fingerprint()
