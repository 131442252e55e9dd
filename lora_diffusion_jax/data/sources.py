"""Opens any data set: a name of TFDS or Hugging Face, a folder or ZIP of images, or an array."""

from collections.abc import Sequence

from lora_diffusion_jax.data.file_source import FileSource
from lora_diffusion_jax.data.hf_source import HfSource, is_hf
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.data.numpy_source import NumpySource, is_array
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
    layout: str = "NHWC",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> ImageSource:
    """Opens a data set of images that all have one size.

    Args:
        name: a TFDS data set, such as 'digits' or 'cifar10', see TfdsSource; or one of Hugging Face,
            'hf:OWNER/NAME', or 'hf' for files in data_dir, see HfSource.
        data_dir: where TFDS data sets lie; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        path: instead of name, a folder or ZIP of images, see FileSource; or an array, .npy or .npz, see
            NumpySource.
        split: a TFDS split or slice, such as 'test' or 'train[:90%]'; a path has only 'train'.
        class_folders: with path, take each image's first folder as its class.
        background: the colour behind transparent pixels, such as 'white' or '#808080'; '' refuses them.
        image_key: the column of images, where a data set of Hugging Face has several, or the array of a .npz.
        label_key: the column or array of labels, likewise.
        layout: of an array, NHWC or NCHW.
        mean: of an array of floats.
        std: of an array of floats.

    Raises:
        UserError: neither or both of name and path are given, or the data set cannot be read.
    """
    if bool(name) == bool(path):
        found = f"data.name={name!r} and data.path={path!r}" if name else "neither"
        raise UserError(
            "expected one of data.name (a TFDS data set, or hf:OWNER/NAME) and data.path (a folder or ZIP "
            "of images, or an array); "
            f"found {found}."
        )
    if name and class_folders:
        raise UserError(f"data.class_folders needs data.path: {name} has its own labels.")
    array = is_array(path)
    if (image_key or label_key) and not (is_hf(name) or array):
        raise UserError(
            f"data.{'image' if image_key else 'label'}_key names a column of a data set of Hugging Face "
            "(data.name=hf:...) or an array of a .npz file; leave it out."
        )
    if (layout != "NHWC" or len(mean) or len(std)) and not array:
        raise UserError(
            "data.layout, data.mean and data.std are for arrays (data.path=FILE.npy or FILE.npz); leave "
            "them out."
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
        from lora_diffusion_jax.data.tfds_source import TfdsSource  # imports TFDS

        return TfdsSource(name, data_dir=data_dir, split=split, background=background)
    if split != "train":
        raise UserError(
            f"data.path has no split {split!r}, only 'train', which is all of it. Put other images "
            "into another folder or ZIP."
        )
    if array and class_folders:
        raise UserError(
            f"data.class_folders is for folders and ZIPs; {path} is an array. Leave it out."
        )
    if array:
        return NumpySource(
            path, layout=layout, mean=mean, std=std, image_key=image_key, label_key=label_key
        )
    return FileSource(path, class_folders=class_folders, background=background)
