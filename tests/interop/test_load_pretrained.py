"""load_pretrained: whatever holds a network becomes the same denoiser, recognised by its content."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import build_denoiser, bypass_lora, variable_shapes
from lora_diffusion_jax.interop import export_network, load_pretrained
from tests.interop.golden import NAMES, outputs, snapshot_path
from tests.small import fast_jit


@pytest.fixture(scope="module")
def adapted():
    """The golden network with LoRA."""
    return load_pretrained(snapshot_path("edm_lora"))


def without_lora(loaded):
    """Base variables and the config that describes them."""
    config = loaded.config.copy_and_resolve_references()
    config.lora.mode = "baseline"
    return {"params": lora.split(loaded.variables["params"])[0]}, config


def arguments(name):
    """Inputs of the golden run, NHWC."""
    r = outputs(name)
    return r["x"].transpose(0, 2, 3, 1), r["sigma"], r["labels"] if r["labels"].size else None


@pytest.mark.parametrize("name", NAMES)
def test_official_snapshots_compute_what_the_official_code_computes(name):
    expected = outputs(name)["D"].transpose(0, 2, 3, 1)
    loaded = load_pretrained(snapshot_path(name))
    found = fast_jit(loaded.denoiser.apply)(loaded.variables, *arguments(name))
    # float32 sums in another order: PyTorch's own versions differ by 1.5e-6 of the output's scale
    assert np.abs(found - expected).max() / np.abs(expected).max() < 5e-6
    shapes = variable_shapes(loaded.config, loaded.denoiser)
    assert jax.tree.map(np.shape, loaded.variables) == jax.tree.map(lambda s: s.shape, shapes)


def test_exports_load_as_the_same_network(adapted, tmp_path):
    path = tmp_path / "n.safetensors"
    export_network(path, adapted.variables, adapted.config, weights="ema")
    again = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, again.variables, adapted.variables)
    assert again.config.to_dict() == adapted.config.to_dict()
    assert again.denoiser == adapted.denoiser


def test_adapters_load_with_their_base_and_ask_for_it(adapted, tmp_path):
    base, config = without_lora(adapted)
    paths = tmp_path / "base.safetensors", tmp_path / "adapters.safetensors"
    export_network(paths[0], base, config, weights="ema")
    export_network(paths[1], adapted.variables, adapted.config, weights="ema", adapters_only=True)
    again = load_pretrained(paths[1], base=paths[0])
    jax.tree.map(np.testing.assert_array_equal, again.variables, adapted.variables)
    with pytest.raises(UserError, match="holds adapters alone"):
        load_pretrained(paths[1])
    with pytest.raises(UserError, match="whole network"):
        load_pretrained(paths[0], base=paths[1])
    base["params"]["model"]["map"]["layer0"]["bias"] = np.zeros(32, np.float32)
    export_network(paths[0], base, config, weights="ema")
    with pytest.raises(UserError, match="adapters for the base"):
        load_pretrained(paths[1], base=paths[0])


def test_bypassed_adapters_leave_the_base(adapted):
    base, config = without_lora(adapted)
    found = fast_jit(bypass_lora(adapted.denoiser).apply)(adapted.variables, *arguments("edm_lora"))
    expected = fast_jit(build_denoiser(config).apply)(base, *arguments("edm_lora"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("content", [b"", b"some text", b"\x80\x04N."])
def test_other_files_are_refused_with_their_name(tmp_path, content):
    path = tmp_path / "what"
    path.write_bytes(content)
    with pytest.raises(UserError, match="what"):
        load_pretrained(path)
    with pytest.raises(UserError, match="does not exist"):
        load_pretrained(tmp_path / "none")


def test_networks_this_project_lacks_are_named_with_their_file(tmp_path):
    path = tmp_path / "other.pkl"
    data = snapshot_path("edm_lora").read_bytes()
    path.write_bytes(data.replace(b"EDMPrecond", b"XYZPrecond"))
    with pytest.raises(UserError, match=r"other\.pkl: .*XYZPrecond"):
        load_pretrained(path)
