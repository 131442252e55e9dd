"""A config completed with what its data set has."""

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.data import complete
from lora_diffusion_jax.factory.networks import image_shape
from tests.small import small_config


class Pictures:
    """A data set of which only the description is read."""

    title, num_classes = "pictures", 3

    def __init__(self, shape):
        self.image_shape = shape

    def fingerprint(self):
        return "f"


def test_sizes_come_from_the_data_set_or_agree_with_it():
    open_sizes = {"data__image_size": 0, "data__channels": 0}
    config = complete(small_config(**open_sizes), Pictures((8, 16, 3)))
    assert image_shape(config) == (8, 16, 3)
    assert config.data.num_classes == 0  # not asked for
    conditional = small_config(**open_sizes, class_conditional=True)
    assert complete(conditional, Pictures((8, 8, 1))).data.num_classes == 3
    for shape, words in (((8, 16, 1), "image_width=8"), ((9, 9, 1), "image_size=8")):
        with pytest.raises(UserError, match=words):
            complete(small_config(), Pictures(shape))
    with pytest.raises(UserError, match="multiples of 2"):
        complete(small_config(**open_sizes), Pictures((9, 8, 1)))
    with pytest.raises(UserError, match="channels=1"):
        complete(small_config(), Pictures((8, 8, 3)))
