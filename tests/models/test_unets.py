"""The U-Nets' behaviour: what they refuse, dropout, label dropout, missing labels, `only_lora`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.models.adm_unet import ADMMapping, ADMUNet
from lora_diffusion_jax.models.improved_unet import ImprovedUNet
from lora_diffusion_jax.models.song_unet import SongMapping, SongUNet
from lora_diffusion_jax.models.unet import check_image_size
from tests.small import random_variables

SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_classes": 4,
    "augment_dim": 2,
    "channels": 8,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (8,),
}


TWO_LEVELS = {"channel_mult": (1, 2), "attn_resolutions": (4,)}


def song(**changes: Any) -> SongUNet:
    return SongUNet(**{**SMALL, **changes})


def adm(**changes: Any) -> ADMUNet:
    return ADMUNet(**{**SMALL, **changes})


def improved(**changes: Any) -> ImprovedUNet:
    return ImprovedUNet(**{**SMALL, "channels": 32, **changes})


NETWORKS = pytest.mark.parametrize("make", [song, adm, improved])


def inputs(batch: int = 2) -> tuple[np.ndarray, ...]:
    """Images, noise labels, class labels."""
    rng = np.random.default_rng(0)
    labels = np.eye(4, dtype=np.float32)[np.arange(batch) % 4]
    x = rng.standard_normal((batch, 8, 8, 3)).astype(np.float32)
    return x, np.linspace(-1, 1, batch, dtype=np.float32), labels


@functools.cache
def evaluation(make: Callable) -> tuple[Callable, Any]:
    """The network in evaluation mode, (variables, *inputs) -> output, and variables for it."""
    return jax.jit(make().apply), random_variables(make(), *inputs())


@NETWORKS
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 9, 8, 3), "9x8.*multiples of 2, such as 8 or 10"),
        ((2, 8, 7, 3), "8x7.*multiples of 2, such as 6 or 8"),
        ((2, 8, 8, 1), "built for 3 channels.*have 1"),
        ((8, 8, 3), r"shape \(8, 8, 3\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_plain_words(
    make: Callable, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make(**TWO_LEVELS).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2))


@pytest.mark.parametrize(
    ("size", "levels", "message"),
    [
        ((30, 30), 3, "30x30.*3 levels halves them 2 times.*multiples of 4, such as 28 or 32. "),
        ((8, 6), 4, "8x6.*multiples of 8, such as 8 or 16. "),
        ((3, 3), 3, "such as 4. "),
    ],
)
def test_image_sizes_that_a_network_cannot_halve_are_named(
    size: tuple[int, int], levels: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_image_size(*size, levels)
    for height, width, fitting in ((32, 32, 4), (8, 8, 1), (28, 28, 3), (16, 64, 5)):
        check_image_size(height, width, fitting)  # does not raise


@NETWORKS
def test_dropout_acts_in_training_alone(make: Callable) -> None:
    evaluate, variables = evaluation(make)
    net = make(dropout=0.3)

    @jax.jit
    def train(variables: Any, key: jax.Array) -> jax.Array:
        return net.apply(variables, *inputs(), None, True, rngs={"dropout": key})

    evaluated = evaluate(variables, *inputs())  # asks for no key
    first, second = (train(variables, jax.random.key(seed)) for seed in (0, 1))
    scale = np.abs(evaluated).max()
    assert np.abs(first - evaluated).max() > 1e-2 * scale
    assert np.abs(first - second).max() > 1e-2 * scale
    np.testing.assert_array_equal(train(variables, jax.random.key(0)), first)


MAPPINGS = pytest.mark.parametrize(
    "make",
    [
        lambda **kw: SongMapping("positional", 8, 16, num_classes=4, augment_dim=2, **kw),
        lambda **kw: SongMapping("fourier", 8, 16, num_classes=4, augment_dim=2, **kw),
        lambda **kw: ADMMapping(8, 16, num_classes=4, augment_dim=2, **kw),
    ],
    ids=["ddpmpp", "ncsnpp", "adm"],
)


@MAPPINGS
def test_label_dropout_zeroes_whole_labels_at_its_rate(make: Callable) -> None:
    batch, rate = 2000, 0.3
    levels, labels = np.zeros(batch, np.float32), np.eye(4, dtype=np.float32)[np.arange(batch) % 4]
    mapping = make(label_dropout=rate)
    variables = random_variables(mapping, levels, labels)
    key = {"dropout": jax.random.key(0)}
    found = mapping.apply(variables, levels, labels, None, True, rngs=key)
    kept = mapping.apply(variables, levels, labels)
    dropped = mapping.apply(variables, levels, None)

    def is_like(reference: jax.Array) -> np.ndarray:
        return np.all(np.abs(np.asarray(found - reference)) < 1e-5, axis=1)

    assert np.abs(kept - dropped).max(axis=1).min() > 1e-3
    # Each row is a whole label, not scaled up by 1 / (1 - rate), or none at all.
    assert np.all(is_like(kept) ^ is_like(dropped))
    deviation = (rate * (1 - rate) / batch) ** 0.5
    assert abs(is_like(dropped).mean() - rate) < 4 * deviation


@MAPPINGS
def test_missing_labels_are_zeros(make: Callable) -> None:
    levels, zeros = np.float32([-0.5, 0.7]), np.zeros((2, 4), np.float32)
    mapping = make()
    variables = random_variables(mapping, levels, zeros)
    run = mapping.apply
    expected = run(variables, levels, zeros, np.zeros((2, 2), np.float32))
    np.testing.assert_allclose(run(variables, levels), expected, atol=1e-6)
    labels = np.eye(4, dtype=np.float32)[:2]
    assert np.abs(run(variables, levels, labels) - expected).max() > 1e-2
    augmented = run(variables, levels, zeros, np.ones((2, 2), np.float32))
    assert np.abs(augmented - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("mapping", "factor"),
    [(functools.partial(SongMapping, "positional"), 2.0), (ADMMapping, 1.0)],
    ids=["ddpmpp", "adm"],
)
def test_ddpmpp_scales_labels_by_the_root_of_their_number(mapping: Any, factor: float) -> None:
    module = mapping(8, 16, num_classes=4)
    levels, labels = np.zeros(1, np.float32), np.float32([[0.5, 0, 0.25, 0.25]])
    variables = random_variables(module, levels, labels)
    _, state = module.apply(
        variables,
        levels,
        labels,
        mutable="intermediates",
        capture_intermediates=lambda module, name: module.name == "label",
    )
    layer = variables["params"]["label"]
    expected = factor * labels @ layer["kernel"] + layer.get("bias", 0)
    found = state["intermediates"]["label"]["__call__"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@NETWORKS
def test_without_affine_a_network_is_one_whose_affine_is_zero(make: Callable) -> None:
    evaluate, variables = evaluation(make)
    bare = make(use_affine=False)
    flat = traverse_util.flatten_dict(variables)
    zeroed = {k: jnp.zeros_like(v) if "affine" in k else v for k, v in flat.items()}
    without = {k: v for k, v in flat.items() if "affine" not in k}
    shapes = jax.eval_shape(bare.init, jax.random.key(0), *inputs())
    assert set(traverse_util.flatten_dict(shapes)) == set(without) < set(flat)
    found = jax.jit(bare.apply)(traverse_util.unflatten_dict(without), *inputs())
    expected = evaluate(traverse_util.unflatten_dict(zeroed), *inputs())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@NETWORKS
def test_a_network_without_mapping_network_has_the_rest_of_the_parameters(make: Callable) -> None:
    def shapes(**settings: Any) -> dict:
        net = make(use_affine=False, **settings)
        params = jax.eval_shape(net.init, jax.random.key(0), *inputs())["params"]
        return traverse_util.flatten_dict(params)

    whole = shapes()
    assert any(path[0] == "map" for path in whole)
    assert shapes(use_map=False) == {k: v for k, v in whole.items() if k[0] != "map"}


@NETWORKS
def test_bfloat16_keeps_float32_parameters_and_comes_close(make: Callable) -> None:
    evaluate, variables = evaluation(make)
    half = make(dtype=jnp.bfloat16)
    deep = make(dtype=jnp.bfloat16, **TWO_LEVELS)  # with resampling, which keeps the type as well
    output, shapes = jax.eval_shape(deep.init_with_output, jax.random.key(0), *inputs())
    assert {s.dtype for s in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    assert output.dtype == jnp.bfloat16
    found = jax.jit(half.apply)(variables, *inputs())
    expected = np.asarray(evaluate(variables, *inputs()))
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.float32(found) - expected).max() < 0.1 * np.abs(expected).max()


def test_attention_stands_where_the_papers_put_it() -> None:
    x, noise_labels, _ = inputs()

    def sites(net: nn.Module) -> set[str]:
        shapes = jax.eval_shape(net.init, jax.random.key(0), x, noise_labels)
        paths = traverse_util.flatten_dict(shapes["params"])
        return {"/".join(path[:-2]) for path in paths if path[-2] == "qkv"}

    two = {"channel_mult": (1, 1)}
    assert sites(song(attn_resolutions=(), **two)) == {"dec/4x4_in0"}
    song_sites = {"enc/8x8_block0", "dec/4x4_in0", "dec/8x8_block1"}
    assert sites(song(attn_resolutions=(8,), **two)) == song_sites
    assert sites(adm(attn_resolutions=(8,), channels=64, **two)) == song_sites | {"dec/8x8_block0"}
    assert sites(adm(attn_resolutions=(8, 4), **two)) == set()  # 8 channels: less than one head
    assert sites(improved(attn_resolutions=(8,), **two)) == song_sites | {"dec/8x8_block0"}
    assert sites(improved(attn_resolutions=(), **two)) == {"dec/4x4_in0"}


@pytest.mark.parametrize("heads", [{"num_heads": 3}, {"num_heads_upsample": 5}, {"num_heads": 0}])
def test_heads_that_cannot_share_the_channels_are_refused(heads: dict[str, int]) -> None:
    with pytest.raises(UserError, match="attention heads cannot share 32 channels"):
        jax.eval_shape(improved(**heads).init, jax.random.key(0), *inputs())


def test_norms_of_32_groups_need_channels_that_they_divide() -> None:
    with pytest.raises(UserError, match="48 channels into 32 equal groups.*multiple of 32"):
        jax.eval_shape(improved(channels=48).init, jax.random.key(0), *inputs())


def test_improved_starts_as_pytorch_starts_it() -> None:
    """Layers that end a residual branch are zero, the others uniform within 1 / sqrt(fan_in)."""
    net = improved(num_classes=1000)
    x, noise_labels, _ = inputs()
    params = jax.jit(net.init)(jax.random.key(0), x, noise_labels)["params"]
    flat = traverse_util.flatten_dict(params)
    for path, value in flat.items():
        layer, leaf = path[-2:]
        if layer in ("conv1", "proj", "out_conv", "augment"):
            assert not np.any(value), path
        elif layer == "label":
            assert abs(np.std(value) - 1) < 0.02
        elif leaf == "scale":
            assert np.all(value == 1)
        elif not layer.startswith(("norm", "out_norm")):
            limit = np.prod(flat[*path[:-1], "kernel"].shape[:-1]) ** -0.5
            assert np.abs(value).max() <= limit, path
            # n draws have an rms within a few limit / sqrt(n) of limit / sqrt(3)
            rms = np.sqrt(np.mean(np.square(value)))
            assert abs(rms - limit / 3**0.5) < 2 * limit / value.size**0.5, path
