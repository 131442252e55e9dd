"""Exports come back bit for bit, whole or as adapters on their base; bad files are one plain line."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_diffusion_jax import lora
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.factory.pretrained import network_fields
from lora_diffusion_jax.interop import (
    base_hash,
    export_network,
    infer_config,
    read_export,
    to_state_dict,
    to_variables,
)
from tests.interop.golden import snapshot
from tests.interop.test_infer import FORMAT_1
from tests.interop.test_names import assert_same


@pytest.fixture(scope="module")
def network():
    """Weights by official names, variables and config of a network with LoRA."""
    ema = snapshot("edm_lora")
    config = infer_config(ema)
    return ema.state_dict(), to_variables(ema.state_dict(), config), config


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory) -> Path:
    """An export of the whole network."""
    path = tmp_path_factory.mktemp("exported") / "out" / "net.safetensors"
    export_network(path, *network[1:], weights="ema")
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_network_comes_back_bit_for_bit(network, tmp_path, dtype):
    weights, _, config = network
    weights = {k: v if "resample" in k else v.astype(dtype) for k, v in weights.items()}
    path = tmp_path / "net.safetensors"
    export_network(path, to_variables(weights, config), config, weights="raw")
    export = read_export(path)
    assert_same(export.state_dict, weights)
    assert (export.content, export.weights) == ("network", "raw")
    assert export.config.to_dict() == config.to_dict()
    assert_same(load_file(path), weights)  # any safetensors reader finds the official names


def test_a_readable_description_lies_beside(network, exported):
    _, variables, config = network
    beside = json.loads(exported.with_suffix(".json").read_text())
    assert beside["format"] == "lora_diffusion_jax/2"
    assert beside["config"] == json.loads(json.dumps(network_fields(config)))
    assert beside["weights"] == "ema"
    assert beside["base_hash"] == base_hash(variables)
    assert sorted(os.listdir(exported.parent)) == ["net.json", "net.safetensors"]


def test_an_export_names_no_place_of_this_machine(network, tmp_path):
    _, variables, config = network
    config = config.copy_and_resolve_references()
    config.data.path = config.data.data_dir = config.init_from = "/home/someone"
    path = tmp_path / "net.safetensors"
    export_network(path, variables, config, weights="ema")
    assert b"someone" not in path.read_bytes() + path.with_suffix(".json").read_bytes()


def test_adapters_alone_hold_no_base(network, tmp_path):
    weights, variables, config = network
    path = tmp_path / "adapters.safetensors"
    export_network(path, variables, config, weights="ema", adapters_only=True)
    export = read_export(path)
    assert export.content == "adapters"
    site = "model.dec.4x4_in0.proj"
    assert f"{site}.lora_up.weight" in export.state_dict
    assert f"{site}.bias" in export.state_dict
    assert f"{site}.conv.weight" not in export.state_dict
    assert_same(export.state_dict, {k: weights[k] for k in export.state_dict})
    base = {"params": lora.split(variables["params"])[0]}
    rebuilt = to_variables(export.state_dict, config, base)
    assert_same(to_state_dict(rebuilt, config), weights)


def test_networks_without_adapters_have_none_to_export(network, tmp_path):
    config = network[2].copy_and_resolve_references()
    config.lora.mode = "baseline"
    base = {"params": lora.split(network[1]["params"])[0]}
    with pytest.raises(UserError, match="no adapters"):
        export_network(tmp_path / "a.safetensors", base, config, weights="ema", adapters_only=True)


def test_a_failed_export_leaves_the_old_file_and_no_litter(network, exported, monkeypatch):
    before = exported.read_bytes()

    def fail(*args):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_diffusion_jax.interop.export.save_file", fail)
    with pytest.raises(UserError, match="no space left"):
        export_network(exported, *network[1:], weights="raw")
    assert exported.read_bytes() == before
    assert sorted(os.listdir(exported.parent)) == ["net.json", "net.safetensors"]


def test_places_that_cannot_be_written_are_named(network, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Cannot use .*file"):
        export_network(tmp_path / "file" / "net.safetensors", *network[1:], weights="ema")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_network(tmp_path / "net.pkl", *network[1:], weights="ema")


def test_truncated_corrupt_and_foreign_files_are_refused(exported, tmp_path):
    data = exported.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (
        b"",
        b"text",
        data[:8],
        data[:100],
        data[: len(data) // 2],
        data[:-1],
        data + b"x",
        b"\xff" * 8 + data[8:],
        data.replace(b'"F32"', b'"F99"', 1),
        data.replace(b'"shape":[', b'"shape":[9', 1),
    ):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.safetensors") as caught:
            read_export(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not a file"):
        read_export(tmp_path / "none.safetensors")


INVALID = {
    "format": ("pt", "another program"),
    "content": ("dataset", "a network or adapters"),
    "weights": ("best", "EMA or raw"),
    "base_hash": ("xyz", "hash"),
}
DESCRIPTIONS = {
    "{": "no valid description",
    "[]": "not a JSON object",
    "[" * 100_000: "no valid description",
    '{"colour": "red"}': "colour",
    '{"model": {"colour": "red"}}': "model.colour",
    '{"model": 3}': "model = 3, which has the wrong type",
    '{"dtype": {"a": 1}}': "dtype.a",
    '{"model": {"channels": "8"}}': "model.channels = 8",
}


def metadata(**changes):
    facts = {"content": "network", "weights": "ema", "base_hash": "0" * 64}
    return {**facts, "format": "lora_diffusion_jax/2", "config": "{}", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({k: value}, message) for k, (value, message) in INVALID.items()),
        *(({"config": text}, message) for text, message in DESCRIPTIONS.items()),
        ({"format": "lora_diffusion_jax/1"}, "no valid description"),
        ({"format": "lora_diffusion_jax/1", "architecture": '{"model": "adm"}'}, "no valid"),
        ({"format": "lora_diffusion_jax/1", "architecture": "[1]"}, "not a JSON object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_metadata_are_refused(tmp_path, changes, message):
    path = tmp_path / "net.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path, metadata(**changes))
    with pytest.raises(UserError, match=message):
        read_export(path)


def test_files_of_format_1_are_still_read(network, tmp_path):
    weights, _, config = network
    path = tmp_path / "net.safetensors"
    old = {"format": "lora_diffusion_jax/1", "architecture": json.dumps(FORMAT_1)}
    save_file(weights, path, metadata(**old))
    export = read_export(path)
    assert export.config.to_dict() == config.to_dict()
    assert_same(export.state_dict, weights)
