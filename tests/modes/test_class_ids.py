"""--class_id as classes."""

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes.sample import choose_classes


@pytest.mark.parametrize(
    ("class_id", "count", "classes", "expected"),
    [(None, 4, 3, None), ("2", 4, 3, 2), ("all", 6, 3, [0, 0, 1, 1, 2, 2])],
)
def test_class_id_texts(class_id, count, classes, expected):
    assert choose_classes(class_id, count, classes) == expected


@pytest.mark.parametrize(("class_id", "classes"), [("x", 3), ("-1", 3), ("all", 0)])
def test_class_id_mistakes(class_id, classes):
    with pytest.raises(UserError, match="--class_id"):
        choose_classes(class_id, 4, classes)
