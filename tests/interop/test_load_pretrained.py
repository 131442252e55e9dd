"""load_pretrained: whatever holds a network becomes the same denoiser, recognised by its content."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop import (
    export_adapters,
    export_network,
    infer_architecture,
    load_pretrained,
    read_snapshot,
)
from lora_diffusion_jax.interop.convert import split_adapters

GOLDEN = Path(__file__).parents[1] / "golden"


def denoise(loaded, x, sigma, labels) -> np.ndarray:
    """D(x; sigma) of NCHW images."""
    x = x.transpose(0, 2, 3, 1)
    out = jax.jit(loaded.denoiser.apply)(loaded.variables, x, sigma, labels)
    return np.asarray(out).transpose(0, 3, 1, 2)


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "snapshot_outputs.npz") as data:
        keys = [key for key in data.files if key.startswith(f"{name}:")]
        return {key.split(":")[1]: data[key] for key in keys}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["edm_lora", "ve_ncsnpp", "iddpm_adm"])
def test_official_snapshots_compute_what_the_official_code_computes(name):
    r = reference(name)
    labels = r["labels"] if r["labels"].size else None
    loaded = load_pretrained(GOLDEN / f"snapshot_{name}.pkl")
    # float32 sums in another order: PyTorch's own versions differ by 1.5e-6 of the output's scale
    assert relative_error(denoise(loaded, r["x"], r["sigma"], labels), r["D"]) < 5e-6


def test_loaded_variables_are_exactly_those_that_the_network_initialises():
    for name in ("edm_lora", "ve_ncsnpp", "iddpm_adm"):
        loaded = load_pretrained(GOLDEN / f"snapshot_{name}.pkl")
        r = reference(name)
        x, labels = r["x"].transpose(0, 2, 3, 1), r["labels"] if r["labels"].size else None
        init = jax.eval_shape(loaded.denoiser.init, jax.random.key(0), x, r["sigma"], labels)
        shapes = jax.tree.map(np.shape, loaded.variables["params"])
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, init["params"])


def test_exports_load_as_the_same_network(tmp_path):
    snapshot = GOLDEN / "snapshot_edm_lora.pkl"
    loaded = load_pretrained(snapshot)
    architecture = infer_architecture(read_snapshot(snapshot).ema)
    export_network(tmp_path / "n.safetensors", loaded.variables, architecture, weights="ema")
    again = load_pretrained(tmp_path / "n.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    assert again.config == loaded.config


def test_adapters_load_with_their_base_and_ask_for_it(tmp_path):
    snapshot = GOLDEN / "snapshot_edm_lora.pkl"
    loaded = load_pretrained(snapshot)
    architecture = infer_architecture(read_snapshot(snapshot).ema)
    base, _ = split_adapters(loaded.variables)
    paths = tmp_path / "base.safetensors", tmp_path / "adapters.safetensors"
    export_network(paths[0], base, architecture | {"lora": None}, weights="ema")
    export_adapters(paths[1], loaded.variables, architecture, weights="ema")
    again = load_pretrained(paths[1], base=paths[0])
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    with pytest.raises(UserError, match="holds adapters alone"):
        load_pretrained(paths[1])
    with pytest.raises(UserError, match="whole network"):
        load_pretrained(paths[0], base=snapshot)


def test_bypassed_adapters_leave_the_base():
    from lora_diffusion_jax import factory

    r = reference("edm_lora")
    loaded = load_pretrained(GOLDEN / "snapshot_edm_lora.pkl")
    base, _ = split_adapters(loaded.variables)
    architecture = infer_architecture(read_snapshot(GOLDEN / "snapshot_edm_lora.pkl").ema)
    bare = factory.denoiser_from_architecture(architecture | {"lora": None})
    bypassed = factory.bypass_lora(loaded.denoiser)
    args = r["x"].transpose(0, 2, 3, 1), r["sigma"], r["labels"]
    found = jax.jit(bypassed.apply)(loaded.variables, *args)
    np.testing.assert_array_equal(found, jax.jit(bare.apply)(base, *args))


@pytest.mark.parametrize("content", [b"", b"some text", b"\x80\x04N."])
def test_other_files_are_refused_with_their_name(tmp_path, content):
    path = tmp_path / "what"
    path.write_bytes(content)
    with pytest.raises(UserError, match="what"):
        load_pretrained(path)
    with pytest.raises(UserError, match="does not exist"):
        load_pretrained(tmp_path / "none")


def test_networks_this_project_lacks_are_named_with_their_file(tmp_path):
    data = (GOLDEN / "snapshot_edm_lora.pkl").read_bytes()
    path = tmp_path / "other.pkl"
    path.write_bytes(data.replace(b"EDMPrecond", b"XYZPrecond"))
    with pytest.raises(UserError, match=r"other\.pkl: .*XYZPrecond"):
        load_pretrained(path)
