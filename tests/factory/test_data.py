"""A config completed with what its data set has."""

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.data import complete
from lora_diffusion_jax.factory.networks import image_shape
from tests.small import small_config


class Pictures:
    """A data set of which only the description is read."""

    title, num_classes, label_origin = "pictures", 3, "folders"
    dtype = np.dtype(np.uint8)

    def __init__(self, shape, class_names=("0", "1", "2"), empty=()):
        self.image_shape, self.class_names, self._empty = shape, class_names, empty

    def empty_classes(self):
        return list(self._empty)

    def fingerprint(self):
        return "f"


def test_sizes_come_from_the_data_set_or_agree_with_it():
    open_sizes = {"data__image_size": 0, "data__channels": 0}
    config = complete(small_config(**open_sizes), Pictures((8, 16, 3)))
    assert image_shape(config) == (8, 16, 3)
    assert config.data.num_classes == 0  # not asked for
    conditional = small_config(**open_sizes, class_conditional=True)
    assert complete(conditional, Pictures((8, 8, 1))).data.num_classes == 3
    assert (
        complete(conditional, Pictures((8, 8, 1))).data.class_names == ()
    )  # the numbers, no names
    for shape, words in (((8, 16, 1), "image_width=8"), ((9, 9, 1), "image_size=8")):
        with pytest.raises(UserError, match=words):
            complete(small_config(), Pictures(shape))
    with pytest.raises(UserError, match="multiples of 2"):
        complete(small_config(**open_sizes), Pictures((9, 8, 1)))
    with pytest.raises(UserError, match="channels=1"):
        complete(small_config(), Pictures((8, 8, 3)))


def test_class_names_are_kept_and_compared():
    conditional = small_config(class_conditional=True)
    pictures = Pictures((8, 8, 1), ("ant", "bee", "cat"))
    config = complete(conditional, pictures)
    assert config.data.class_names == ("ant", "bee", "cat")
    assert complete(config, pictures).data.class_names == config.data.class_names
    with pytest.raises(
        UserError, match="data.class_names=ant,bee,cat, but pictures has bee,ant,cat"
    ):
        complete(config, Pictures((8, 8, 1), ("bee", "ant", "cat")))
    assert complete(small_config(), pictures).data.class_names == ()  # not asked for


def test_a_class_without_images_is_an_error_where_classes_count():
    pictures = Pictures((8, 8, 1), empty=[0])
    with pytest.raises(UserError, match="Class 0 of pictures has no images .*from 0 without gaps"):
        complete(small_config(class_conditional=True), pictures)
    assert complete(small_config(), pictures)
