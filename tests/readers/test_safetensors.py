"""Untrusted safetensors files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.readers.safetensors import read_safetensors
from tests.test_untrusted import fuzz

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(2.0, np.float16),
    "none": np.zeros((0, 5), np.float32),
}


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_tensors_of_all_shapes_are_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(TENSORS, {"k": "v"}))
    metadata, arrays = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    for name, value in TENSORS.items():
        assert arrays[name].shape == value.shape
        np.testing.assert_array_equal(arrays[name], value)
    entry = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}
    _, arrays = read_safetensors(write(tmp_path / "b.safetensors", {"b": entry}, b"\x80\x3f"))
    assert arrays["b"].dtype == ml_dtypes.bfloat16
    assert arrays["b"][0] == 1


def entry(dtype="F32", shape=(1,), end=4):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}}


BAD = {
    "float8": (entry("F8_E4M3", end=1), "has the type F8_E4M3; expected one of F64"),
    "float4": (entry("F4", (2,), 1), "has the type F4"),
    "complex": (entry("C64", end=8), "has the type C64"),
    "type of a number": (entry(5), "has the type 5"),
    "4 TB": (entry(shape=(2**40,), end=2**42), "corrupt or truncated"),
    "shape": (entry(shape=(-1,)), "corrupt or truncated"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not valid JSON"),
    "twice": (b'{"a":{},"a":{}}', "the key 'a' appears twice"),
    "metadata": ({"__metadata__": 5}, "corrupt or truncated"),
    "text": (b'{"a":"\x1b[2J"}', "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_headers_that_cannot_be_read_are_one_sentence(tmp_path, case):
    header, says = BAD[case]
    with pytest.raises(UserError, match=says) as caught:
        read_safetensors(
            write(tmp_path / "x.safetensors", header, bytes(8)[: 8 if "complex" in case else 4])
        )
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_never_raise_anything_but_a_user_error(tmp_path, count):
    assert fuzz(read_safetensors, save(TENSORS), tmp_path / "x.safetensors", count) > count / 3
