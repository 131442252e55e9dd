"""--class_id as classes."""

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.modes.sample import choose_classes, name_classes


@pytest.mark.parametrize(
    ("class_id", "count", "classes", "expected"),
    [(None, 4, 3, None), ("2", 4, 3, 2), ("all", 6, 3, [0, 0, 1, 1, 2, 2])],
)
def test_class_id_texts(class_id, count, classes, expected):
    assert choose_classes(class_id, count, classes) == expected


@pytest.mark.parametrize(
    ("class_id", "expected"),
    [("cat", 1), ("caf\u00e9", 2), ("cafe\u0301", 2), ("all", [0, 1, 2])]
    + [("1", 1), ("number:2", 2), ("name:2", 0), ("name:cat", 1), ("number:0", 0)],
)
def test_classes_by_name(class_id, expected):
    assert choose_classes(class_id, 3, 3, ("2", "cat", "caf\u00e9")) == expected


def test_one_class_s_number_and_another_s_name():
    names = ("1", "2", "3", "3:", "name:1")
    with pytest.raises(
        UserError, match="number of class 1 2 and the name of class 0; .*=number:1 or"
    ):
        choose_classes("1", 4, 5, names)
    chosen = [choose_classes(text, 4, 5, names) for text in ("number:1", "3:", "4", "name:1", "0")]
    assert chosen == [1, 3, 4, 4, 0]
    assert choose_classes("3", 4, 3, names[:3]) == 2  # there is no class of this number
    assert choose_classes("1", 4, 3, ("0", "1", "2")) == 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="--class_id=dog .* the names 0 ant, 1 cat"):
        choose_classes("dog", 4, 2, ("ant", "cat"))
    assert name_classes([1, 2, 3], ["a", "b\n", "c", "d"], limit=2) == [
        "1 b\\n",
        "2 c",
        "... (3 in all)",
    ]


@pytest.mark.parametrize(
    ("class_id", "classes"),
    [("9" * 10, 3), ("\u0663", 3), ("x", 3), ("-1", 3), ("all", 0), ("name:1", 3), ("number:x", 3)],
)
def test_class_id_mistakes(class_id, classes):
    with pytest.raises(UserError, match="--class_id"):
        choose_classes(class_id, 4, classes)
