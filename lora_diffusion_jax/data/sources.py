"""Opens any image data set: a TFDS name, or a folder or ZIP of images."""

from lora_diffusion_jax.data.file_source import FileSource
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.data.tfds_source import TfdsSource
from lora_diffusion_jax.errors import UserError


def open_source(
    name: str = "",
    data_dir: str = "",
    path: str = "",
    split: str = "train",
    *,
    class_folders: bool = False,
    background: str = "",
) -> ImageSource:
    """Opens a data set of images that all have one size.

    Args:
        name: a TFDS data set, such as 'digits' or 'cifar10'; see TfdsSource.
        data_dir: where TFDS data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        path: instead of name, a folder or ZIP of images; see FileSource.
        split: a TFDS split or slice, such as 'test' or 'train[:90%]'; a path has only 'train'.
        class_folders: with path, take each image's first folder as its class.
        background: the colour behind transparent pixels, such as 'white' or '#808080'; '' refuses them.

    Raises:
        UserError: neither or both of name and path are given, or the data set cannot be read.
    """
    if bool(name) == bool(path):
        found = f"data.name={name!r} and data.path={path!r}" if name else "neither"
        raise UserError(
            "expected one of data.name (a TFDS data set) and data.path (a folder or ZIP of images); "
            f"found {found}."
        )
    if name and class_folders:
        raise UserError("data.class_folders needs data.path: a TFDS data set has its own labels.")
    if name:
        return TfdsSource(name, data_dir=data_dir, split=split, background=background)
    if split != "train":
        raise UserError(
            f"data.path has no split {split!r}, only 'train', which is all of it. Put other images "
            "into another folder or ZIP."
        )
    return FileSource(path, class_folders=class_folders, background=background)
