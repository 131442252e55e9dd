"""Our networks against the outputs of the authors' PyTorch code (tests/golden/net_*.npz)."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_diffusion_jax import lora
from lora_diffusion_jax.diffusion.precond import Denoiser
from lora_diffusion_jax.factory.networks import build_denoiser, bypass_lora
from lora_diffusion_jax.interop import to_variables
from lora_diffusion_jax.interop.infer import config_from_official

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("net_*.npz"))
WITH_LORA = [case for case in CASES if case.endswith("_lora")]

# Largest error of a sample over its largest value. The float32 noise of the reference alone (its
# convolutions by another library) is about 1.5e-6; a wrong operation shows at 1e-3 and above.
TOLERANCE = 5e-6


class Reference(NamedTuple):
    arrays: dict[str, np.ndarray]
    config: ConfigDict
    denoiser: Denoiser
    variables: dict[str, Any]


def config_of(meta: dict[str, Any]) -> ConfigDict:
    """The config of the network that a golden file records."""
    arguments = dict(meta["init_kwargs"])
    network = arguments.pop("model_type")
    arguments["in_channels"] = arguments.pop("img_channels")
    names = {"lora_rank": "rank", "num_basis": "bases", "mlp_width": "widths"}
    adapters = meta["lora"] and {ours: meta["lora"][theirs] for theirs, ours in names.items()}
    precond = meta["precond_class"].removesuffix("Precond").lower()
    return config_from_official(network, arguments, precond, {}, adapters=adapters)


@functools.cache
def load(case: str) -> Reference:
    arrays = dict(np.load(GOLDEN / f"{case}.npz"))
    config = config_of(json.loads(str(arrays["meta"])))
    state_dict = {k[2:]: np.float32(v) for k, v in arrays.items() if k.startswith("p:")}
    variables = to_variables(state_dict, config)
    return Reference(arrays, config, build_denoiser(config), variables)


def nhwc(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.float32(images), 1, -1)


def error(found: Any, expected: np.ndarray) -> float:
    """Largest error of a sample over the sample's largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(found - expected).max(axes) / np.abs(expected).max(axes)).max())


def variants(case: str) -> dict[str, tuple]:
    """Name of an output -> the arguments that give it."""
    z = load(case).arrays
    x, sigma, labels = nhwc(z["in:x"]), z["in:sigma"], z.get("in:class_labels")
    calls = {
        "D": (x, sigma, labels),
        "D_scalar_sigma": (x, np.float32(0.7), labels),
        "D_bypass": (x, sigma, labels),
    }
    if labels is not None:
        calls["D_aug"] = (x, sigma, labels, np.float32(z["in:augment_labels"]))
        calls["D_nolabel"] = (x, sigma)
    return {name: args for name, args in calls.items() if f"out:{name}" in z}


@functools.cache
def inside(case: str) -> dict[str, Any]:
    """D and what leads to it: the embedding, the raw network and the composition weights."""
    reference = load(case)
    denoiser, args = reference.denoiser, variants(case)["D"]
    wanted = {("model",), ("model", "map")}

    def run(variables: Any) -> dict[str, Any]:
        images, state = denoiser.apply(
            variables,
            *args,
            mutable=["intermediates"],
            capture_intermediates=lambda module, name: module.path in wanted,
        )
        model = state["intermediates"]["model"]
        found = {"D": images, "F": model["__call__"][-1], "emb": model["map"]["__call__"][-1]}
        if reference.config.lora.mode != "baseline":
            found["omega"] = lora.composition_weights(denoiser, variables, *args)
        return found

    return jax.jit(run)(reference.variables)


# Each path of the code once; what only repeats it on another network waits for the slow tests.
REPEATED = {
    "net_ve_ncsnpp_cond_lora": {"D_scalar_sigma", "D_nolabel", "D_aug", "D_bypass"},
    "net_iddpm_ddpmpp_cond": {"D_scalar_sigma", "D_nolabel", "D_aug"},
    "net_vp_ddpmpp_uncond": {"D_scalar_sigma"},
}
OUTPUTS = [
    pytest.param(
        case,
        name,
        marks=[pytest.mark.slow] if name in REPEATED.get(case, ()) else [],
        id=f"{case}-{name}",
    )
    for case in CASES
    for name in variants(case)
]


@pytest.mark.parametrize(("case", "name"), OUTPUTS)
def test_denoiser_agrees_with_the_reference(case: str, name: str) -> None:
    reference, args = load(case), variants(case)[name]
    if name == "D":
        found = inside(case)["D"]
    else:
        bypassed = name == "D_bypass"
        denoiser = bypass_lora(reference.denoiser) if bypassed else reference.denoiser
        found = jax.jit(denoiser.apply)(reference.variables, *args)
    assert error(found, nhwc(reference.arrays[f"out:{name}"])) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_raw_network_and_embedding_agree_with_the_reference(case: str) -> None:
    expected = load(case).arrays
    assert error(inside(case)["F"], nhwc(expected["mid:D:F"])) < TOLERANCE
    assert error(inside(case)["emb"], expected["mid:D:emb"]) < TOLERANCE


@pytest.mark.parametrize("case", WITH_LORA)
def test_composition_weights_agree_with_the_reference(case: str) -> None:
    head = "mid:D:omega:"
    expected = {k.removeprefix(head): v for k, v in load(case).arrays.items() if k.startswith(head)}
    found = inside(case)["omega"]
    assert set(found) == {name.replace(".", "/") for name in expected}
    for name, value in expected.items():
        assert error(found[name.replace(".", "/")], value) < TOLERANCE


def test_adapters_of_the_reference_matter() -> None:
    for case in WITH_LORA:
        z = load(case).arrays
        assert error(z["out:D_bypass"], z["out:D"]) > 1e-3
