"""State dicts of improved-diffusion: read without PyTorch, the same outputs, and back bit for bit."""

import jax
import numpy as np
import pytest

from lora_diffusion_jax import lora
from lora_diffusion_jax.default_config import base
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.networks import variable_shapes
from lora_diffusion_jax.factory.pretrained import start_from
from lora_diffusion_jax.interop import (
    export_network,
    load_pretrained,
    read_export,
    to_state_dict,
    to_variables,
)
from tests.interop.openai import CASES, case, write
from tests.interop.test_names import assert_same, network_variables
from tests.readers import pickling
from tests.readers.watching import nothing_runs
from tests.small import fast_jit


@pytest.fixture(scope="module", params=CASES)
def network(request, tmp_path_factory):
    """A case of the golden file, and its .pt file loaded."""
    path = tmp_path_factory.mktemp("openai") / "net.pt"
    known = case(request.param)
    return known, load_pretrained(write(path, known.state_dict), config=known.config)


def test_raw_networks_compute_what_pytorch_computes(network):
    known, loaded = network
    found = fast_jit(loaded.network.apply)(loaded.variables, *known.inputs)
    assert found.shape == known.output.shape
    # float32 sums in another order, some 1.5e-5 on one processor; a wrong order of heads shows at 1e-3
    assert np.abs(found - known.output).max() / np.abs(known.output).max() < 2e-5


def test_the_denoiser_has_the_channels_of_the_images(network):
    known, loaded = network
    x, _, labels = known.inputs
    denoised = jax.eval_shape(loaded.denoiser.apply, loaded.variables, x, np.float32(1), labels)
    assert denoised.shape == x.shape


def test_names_shapes_and_bits_come_back(network):
    known, loaded = network
    assert_same(to_state_dict(loaded.variables, loaded.config), known.state_dict)


def test_values_lie_where_the_network_looks_for_them():
    known = case("scale_shift")
    weights, config = known.state_dict, known.config.copy_and_resolve_references()
    config.lora.mode = "baseline"
    params = to_variables(weights, config)["params"]["model"]
    np.testing.assert_array_equal(params["map"]["label"]["kernel"], weights["label_emb.weight"])
    qkv = weights["input_blocks.3.1.qkv.weight"]
    np.testing.assert_array_equal(params["enc"]["4x4_block0"]["qkv"]["kernel"], qkv[:, :, 0].T)
    up = weights["output_blocks.1.2.conv.weight"]
    kernel = params["dec"]["8x8_up"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, up.transpose(2, 3, 1, 0))


def test_a_file_is_a_base_whatever_lora_the_config_asks_for(tmp_path):
    known = case("shift")
    path = write(tmp_path / "net.pt", known.state_dict)
    for mode in ("baseline", "with_lora", "only_lora"):
        config = known.config.copy_and_resolve_references()
        config.lora.mode, config.lora.adapter = mode, "time"
        loaded = load_pretrained(path, config=config)
        assert loaded.config.lora.mode == "baseline"
        assert not lora.list_sites(loaded.variables["params"])
        assert config.lora.mode == mode


@pytest.mark.parametrize("mode", ["with_lora", "only_lora"])
def test_adapters_alone_rejoin_the_file_that_they_were_trained_on(mode, tmp_path):
    """With only_lora without the layers of the file that its network has not."""
    known, path = case("shift"), tmp_path / "adapters.safetensors"
    config = known.config.copy_and_resolve_references()
    config.lora.mode, config.lora.adapter = mode, "time"
    base = write(tmp_path / "net.pt", known.state_dict)
    start = load_pretrained(base, config=config)
    variables, notes = start_from(start, config, network_variables(config), "net.pt")
    assert notes == []
    export_network(path, variables, config, weights="raw", adapters_only=True)
    joined = load_pretrained(path, base=base)
    jax.tree.map(np.testing.assert_array_equal, joined.variables, variables)
    assert joined.config.lora.mode == mode
    moved = {k: v + 1 if k == "out.0.weight" else v for k, v in known.state_dict.items()}
    with pytest.raises(UserError, match="adapters for the base"):
        load_pretrained(path, base=write(tmp_path / "moved.pt", moved))


def test_classlora_alone_needs_no_class_embedding_of_its_base(tmp_path):
    known = case("shift")
    path = write(tmp_path / "net.pt", known.state_dict)
    config = known.config.copy_and_resolve_references()
    config.class_conditional, config.data.num_classes = True, 3
    config.lora.mode, config.lora.adapter = "only_lora", "time_class"
    start = load_pretrained(path, config=config)
    assert not start.config.class_conditional
    variables, _ = start_from(start, config, network_variables(config), "net.pt")
    kernel = known.state_dict["input_blocks.0.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables["params"]["model"]["enc"]["8x8_conv"]["kernel"], kernel)
    config.lora.mode = "with_lora"
    with pytest.raises(UserError, match="it lacks: label_emb.weight"):
        load_pretrained(path, config=config)


def test_files_that_do_not_fit_their_config_are_named(tmp_path):
    known = case("shift")
    changed = {k: v for k, v in known.state_dict.items() if k != "out.0.weight"}
    changed |= {"label_emb.weight": np.zeros((3, 128), np.float32)}
    changed |= {"time_embed.2.bias": np.zeros(3, np.float32)}
    path = write(tmp_path / "net.pt", changed)
    with pytest.raises(UserError) as error:
        load_pretrained(path, config=known.config)
    for words in (
        f"{path}: ",
        "it lacks: out.0.weight;",
        "left over: label_emb.weight;",
        "other shapes: time_embed.2.bias is (3,) there, (128,) here.",
    ):
        assert words in str(error.value)


def test_a_state_dict_asks_for_its_config(tmp_path):
    path = write(tmp_path / "net.pt", {"w": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"net\.pt holds tensors by name.*--config="):
        load_pretrained(path)
    path = write(tmp_path / "net.pt", {"input_blocks.0.0.weight": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"has model\.name=ddpmpp; .* model\.name=improved"):
        load_pretrained(path, config=base())
    with pytest.raises(UserError, match="whole network"):
        load_pretrained(path, base=path, config=case("shift").config)
    legacy = tmp_path / "legacy.pt"
    legacy.write_bytes(pickling.legacy_file({}, []))
    with pytest.raises(UserError, match="holds tensors by name"):
        load_pretrained(legacy)


def test_hostile_files_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload = pickling.Call(pickling.Global("os", "system"), ("touch EXECUTED",))
    config = case("shift").config
    for data in (
        pickling.torch_zip({"w": payload}, {}),
        pickling.legacy_file({"w": payload}, []),
        pickling.torch_zip(payload, {}),
    ):
        path = tmp_path / "net.pt"
        path.write_bytes(data)
        with nothing_runs(), pytest.raises(UserError, match="refers to os.system") as caught:
            load_pretrained(path, config=config)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        (np.int64, 1, "has the type int64; expected float32 or a half precision"),
        (np.bool_, 1, "has the type bool"),
        (np.float64, 1, "has the type float64"),
        (np.float32, np.nan, "holds NaN or infinity"),
        (np.float16, np.inf, "holds NaN or infinity"),
    ],
)
def test_weights_of_other_types_are_refused(tmp_path, dtype, value, says):
    known = case("shift")
    name = "time_embed.0.bias"
    changed = {name: np.full(known.state_dict[name].shape, value, dtype)}
    path = write(tmp_path / "net.pt", known.state_dict | changed)
    with pytest.raises(UserError, match=says) as caught:
        load_pretrained(path, config=known.config)
    assert "\n" not in str(caught.value)


def test_self_describing_files_must_agree_with_a_config(network, tmp_path):
    known, loaded = network
    path = tmp_path / "net.safetensors"
    export_network(path, loaded.variables, loaded.config, weights="raw")
    assert_same(read_export(path).state_dict, known.state_dict)
    again = load_pretrained(path, config=loaded.config)
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    other = loaded.config.copy_and_resolve_references()
    other.model.num_heads = 8
    with pytest.raises(UserError, match="model.num_heads"):
        load_pretrained(path, config=other)


@pytest.mark.parametrize("adapter", ["uc", "time_class"])
@pytest.mark.parametrize("mode", ["with_lora", "only_lora"])
def test_adapted_networks_have_unique_names_and_come_back(adapter, mode):
    config = case("scale_shift").config.copy_and_resolve_references()
    config.lora.adapter, config.lora.mode = adapter, mode
    variables = network_variables(config)
    state_dict = to_state_dict(variables, config)
    assert len(state_dict) == len(jax.tree.leaves(variables))
    bare = {k for k in state_dict if ".lora_" not in k and ".comp_weights." not in k}
    assert "middle_block.1.qkv.conv.weight" in bare
    assert ("time_embed.0.weight" in bare) == (mode == "with_lora" or adapter == "uc")
    jax.tree.map(np.testing.assert_array_equal, to_variables(state_dict, config), variables)


def test_loaded_variables_are_those_of_the_network(network):
    _, loaded = network
    shapes = variable_shapes(loaded.config, loaded.denoiser)
    assert jax.tree.map(np.shape, loaded.variables) == jax.tree.map(lambda s: s.shape, shapes)
