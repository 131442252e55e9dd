"""Exports come back bit for bit, whole or as adapters on their base; bad files are one plain line."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop import (
    attach_adapters,
    base_hash,
    export_adapters,
    export_network,
    infer_architecture,
    read_export,
    read_snapshot,
    to_variables,
)
from lora_diffusion_jax.interop.convert import split_adapters

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def network():
    ema = read_snapshot(GOLDEN / "snapshot_edm_lora.pkl").ema
    architecture = infer_architecture(ema)
    return ema.state_dict(), to_variables(ema.state_dict(), architecture), architecture


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_network_comes_back_bit_for_bit(network, tmp_path, dtype):
    weights, _, architecture = network
    weights = {k: v if "resample" in k else v.astype(dtype) for k, v in weights.items()}
    path = tmp_path / "out" / "net.safetensors"
    export_network(path, to_variables(weights, architecture), architecture, weights="raw")
    export = read_export(path)
    assert_same(export.state_dict, weights)
    assert (export.content, export.weights, export.architecture) == ("network", "raw", architecture)
    assert_same(load_file(path), weights)  # any safetensors reader finds the official names


def test_a_readable_description_lies_beside(network, tmp_path):
    _, variables, architecture = network
    export_network(tmp_path / "net.safetensors", variables, architecture, weights="ema")
    beside = json.loads((tmp_path / "net.json").read_text())
    assert beside["architecture"] == architecture
    assert beside["weights"] == "ema"
    assert beside["base_hash"] == base_hash(variables, architecture)
    assert sorted(os.listdir(tmp_path)) == ["net.json", "net.safetensors"]


def test_adapters_alone_come_back_on_their_base(network, tmp_path):
    weights, variables, architecture = network
    base, _ = split_adapters(variables)
    path = tmp_path / "adapters.safetensors"
    export_adapters(path, variables, architecture, weights="ema")
    export = read_export(path)
    site = "model.dec.4x4_in0.proj"
    assert f"{site}.lora_up.weight" in export.state_dict
    assert f"{site}.bias" in export.state_dict
    assert f"{site}.conv.weight" not in export.state_dict
    assert path.stat().st_size < 0.7 * sum(v.nbytes for v in weights.values())
    for under, arch in ((base, architecture | {"lora": None}), (variables, architecture)):
        merged, merged_architecture = attach_adapters(export, under, arch, path)
        assert merged_architecture == architecture
        export_network(tmp_path / "whole.safetensors", merged, architecture, weights="ema")
        assert_same(read_export(tmp_path / "whole.safetensors").state_dict, weights)


def test_adapters_refuse_another_base(network, tmp_path):
    _, variables, architecture = network
    path = tmp_path / "adapters.safetensors"
    export_adapters(path, variables, architecture, weights="ema")
    base, _ = split_adapters(variables)
    base["params"]["model"]["map"]["layer0"]["bias"] = np.zeros(32, np.float32)
    with pytest.raises(UserError, match="adapters for the base"):
        attach_adapters(read_export(path), base, architecture | {"lora": None}, path)


def test_networks_without_adapters_have_none_to_export(network, tmp_path):
    _, variables, architecture = network
    base, _ = split_adapters(variables)
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="no adapters"):
        export_adapters(path, base, architecture | {"lora": None}, weights="ema")


def test_a_failed_export_leaves_the_old_file_and_no_litter(network, tmp_path, monkeypatch):
    _, variables, architecture = network
    path = tmp_path / "net.safetensors"
    export_network(path, variables, architecture, weights="ema")
    before = path.read_bytes()

    def fail(*args):
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lora_diffusion_jax.interop.export.save_file", fail)
    with pytest.raises(UserError, match="cannot be written: disk full"):
        export_network(path, variables, architecture, weights="raw")
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["net.json", "net.safetensors"]


def test_places_that_cannot_be_written_are_named(network, tmp_path):
    _, variables, architecture = network
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "net.safetensors"
    with pytest.raises(UserError, match="file/net.safetensors cannot be written"):
        export_network(path, variables, architecture, weights="ema")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_network(tmp_path / "net.pkl", variables, architecture, weights="ema")


def test_truncated_damaged_and_foreign_files_are_refused(network, tmp_path):
    _, variables, architecture = network
    path = tmp_path / "net.safetensors"
    export_network(path, variables, architecture, weights="ema")
    data = path.read_bytes()
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
    with pytest.raises(UserError, match="does not exist"):
        read_export(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "another program"),
        ({"content": "dataset"}, "a network or adapters"),
        ({"weights": "best"}, "EMA or raw"),
        ({"base_hash": "xyz"}, "hash"),
        ({"architecture": "{"}, "no valid architecture"),
        ({"architecture": "[" * 100_000}, "no valid architecture"),
        ({"architecture": '{"model": "adm"}'}, "no valid architecture"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(network, tmp_path, changes, message):
    weights, variables, architecture = network
    metadata = {
        "format": "lora_diffusion_jax/1",
        "content": "network",
        "weights": "ema",
        "base_hash": base_hash(variables, architecture),
        "architecture": json.dumps(architecture),
    }
    path = tmp_path / "net.safetensors"
    save_file(weights, path, metadata)
    assert read_export(path).architecture == architecture
    save_file(weights, path, metadata | changes)
    with pytest.raises(UserError, match=message):
        read_export(path)
