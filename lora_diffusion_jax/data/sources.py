"""Opens any image data set: a name of TFDS or Hugging Face, or a folder or ZIP of images."""

from lora_diffusion_jax.data.file_source import FileSource
from lora_diffusion_jax.data.hf_source import HfSource, is_hf
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
    image_key: str = "",
    label_key: str = "",
) -> ImageSource:
    """Opens a data set of images that all have one size.

    Args:
        name: a TFDS data set, such as 'digits' or 'cifar10', see TfdsSource; or one of Hugging Face,
            'hf:OWNER/NAME', or 'hf' for files in data_dir, see HfSource.
        data_dir: where TFDS data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        path: instead of name, a folder or ZIP of images; see FileSource.
        split: a TFDS split or slice, such as 'test' or 'train[:90%]'; a path has only 'train'.
        class_folders: with path, take each image's first folder as its class.
        background: the colour behind transparent pixels, such as 'white' or '#808080'; '' refuses them.
        image_key: the column of images, where a data set of Hugging Face has several.
        label_key: the column of labels, likewise.

    Raises:
        UserError: neither or both of name and path are given, or the data set cannot be read.
    """
    if bool(name) == bool(path):
        found = f"data.name={name!r} and data.path={path!r}" if name else "neither"
        raise UserError(
            "expected one of data.name (a TFDS data set, or hf:OWNER/NAME) and data.path (a folder or ZIP "
            "of images); "
            f"found {found}."
        )
    if name and class_folders:
        raise UserError(f"data.class_folders needs data.path: {name} has its own labels.")
    if (image_key or label_key) and not is_hf(name):
        raise UserError(
            f"data.{'image' if image_key else 'label'}_key names a column of a data set of Hugging Face "
            "(data.name=hf:...); leave it out."
        )
    if is_hf(name):
        return HfSource(
            name,
            data_dir=data_dir,
            split=split,
            image_key=image_key,
            label_key=label_key,
            background=background,
        )
    if name:
        return TfdsSource(name, data_dir=data_dir, split=split, background=background)
    if split != "train":
        raise UserError(
            f"data.path has no split {split!r}, only 'train', which is all of it. Put other images "
            "into another folder or ZIP."
        )
    return FileSource(path, class_folders=class_folders, background=background)
