"""What configs may not hold, whoever wrote them."""

import re
import time

import pytest

from lora_diffusion_jax.default_config import sampler
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.checks import check, check_sites
from tests.small import small_config

PATH = "model/enc/32x32_block0/qkv/" + "a" * 30  # longer than any layer's here

USEFUL = [
    r".*/(qkv|proj)",
    r".*/(qkv|proj|conv0|conv1|affine|norm0|norm1|skip|map_layer0|map_layer1|aux_up|aux_conv)",
    r"(?:enc|dec)/.*_block[0-9]+/(qkv|proj)",
    r".*enc.*/.*block.*/(qkv|proj)",
    r"enc/16x16_block\d/[^/]+",
    r".*[*+(){}?]?x\)",
]
ENDLESS = [
    r"(a*)*b",
    r"(.+)+!",
    r"(?:a|aa)+!",
    r"(.|.)*!",
    r"((a?)?)?b",
    r".*.*.*.*.*.*.*.*!",
    r"a?" * 40 + "a" * 40,
    r"(.|.)" * 30 + "!",
    r"(.|..|...)" * 16 + "!",
    r".{1,9}" * 9 + "!",
    r"(a)\1*(?=x)",
    r"a" * 201,
]


@pytest.mark.parametrize("pattern", USEFUL)
def test_patterns_of_sites_are_accepted(pattern):
    check_sites(pattern)
    re.compile(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_could_match_for_ever_are_refused(pattern):
    with pytest.raises(UserError, match=r"^lora\.sites .*expected"):
        check(small_config(lora__sites=pattern))


@pytest.mark.parametrize(
    "pattern", [".*" * 4 + "!", "(.|..|...)" * 8 + ".*!", "a?" * 13 + ".*!", "(.|.)" * 13 + ".*!"]
)
def test_the_slowest_accepted_patterns_are_fast(pattern):
    check_sites(pattern)
    start = time.process_time()
    assert not re.fullmatch(pattern, PATH)
    assert time.process_time() - start < 1  # a network has some hundred layers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampler.num_steps", 10**8),
        ("eval.num_steps", 10**8),
        ("sampler.num_steps", -1),
        ("train.max_nonfinite", -1),
    ],
)
def test_numbers_out_of_range_are_refused(field, value):
    group, name = field.split(".")
    with pytest.raises(UserError, match=rf"^{field} is {value}; it must be"):
        check(small_config(**{f"{group}__{name}": value}))
    config = small_config()
    config.sampler = sampler("euler")
    del config.sampler["num_steps"]  # a sampler of one's own may have no such field
    check(config)


@pytest.mark.parametrize("names", [("a", 1), ("a", "b")])
def test_class_names_fit_the_classes(names):
    with pytest.raises(UserError, match="class_names"):
        check(small_config(data__class_names=names, data__num_classes=3))
