"""Honest files: every tensor that official code wrote comes back bit for bit."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.readers.pickles import read_snapshot, read_torch_state_dict
from tests.readers import pickling as p
from tests.readers.watching import nothing_runs
from tests.small import unpacked

GOLDEN = Path(__file__).parents[1] / "golden"


def values(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The weights that golden/make_checkpoints.py gave tensor number `index`."""
    count = int(np.prod(shape, dtype=np.int64))
    return ((np.arange(count) * 7 + 13 * index) % 1021 - 510).reshape(shape) / np.float32(2048)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", ["edm_lora", "ve_ncsnpp", "iddpm_adm"])
def test_official_snapshot_gives_its_weights_and_never_runs_its_source(name):
    read_snapshot(GOLDEN / f"snapshot_{name}.pkl")  # codecs that Python imports on first use
    with nothing_runs():
        weights = read_snapshot(GOLDEN / f"snapshot_{name}.pkl").state_dict()
    assert len(weights) > 80
    for index, (key, array) in enumerate(weights.items()):
        if key != "u" and not key.endswith("resample_filter"):
            np.testing.assert_array_equal(array, values(index, array.shape), err_msg=key)
            assert array.dtype == np.float32


def test_snapshot_keeps_classes_attributes_and_recorded_arguments():
    ema = read_snapshot(GOLDEN / "snapshot_edm_lora.pkl")
    nodes = dict(ema.walk())
    assert ema.class_name == "EDMPrecond"
    assert ema.attributes["sigma_data"] == 0.5
    assert nodes["model"].init_kwargs["model_channels"] == 8
    assert nodes["model.enc.4x4_block0.qkv"].class_name == "LoraInjectedConv"
    assert nodes["model.enc.4x4_block0.qkv"].attributes["lora_rank"] == 2
    # a numpy scalar in the file, numpy._core.multiarray.scalar
    assert nodes["model.enc.4x4_block0"].attributes["skip_scale"] == np.sqrt(0.5)


def test_snapshot_of_torch_1_12_and_numpy_1_24_equals_the_reference(tmp_path):
    """The SHA-256 is that of the state_dict which the authors' code gave for the same network."""
    path = unpacked(GOLDEN / "snapshot_torch112.pkl.xz", tmp_path)
    weights = read_snapshot(path).state_dict()
    digest = hashlib.sha256()
    for name, array in weights.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    assert len(weights) == 153
    expected = "b46060375098aae27e068769061e7d9eb330078ce4847a06d47fb502425263ca"
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("name", ["tensors_zip.pt", "tensors_legacy.pt"])
def test_every_dtype_and_layout_of_torch_files(name):
    shared = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / np.float32(4),
        "float64": np.arange(3) / 3.0,
        "float16": np.arange(4, dtype=np.float16) / np.float16(8),
        "bfloat16": (np.arange(4) / 8).astype(ml_dtypes.bfloat16),
        "int64": np.arange(3) - 2**40,
        "int8": np.arange(3, dtype=np.int8) - np.int8(2),
        "uint8": np.arange(250, 256, dtype=np.uint8),
        "bool": np.array([True, False, True]),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": np.ascontiguousarray(shared.T),
        "window": np.ascontiguousarray(shared[1:3, 2:5]),
        "expanded": np.array([[1, 1, 1], [2, 2, 2]], np.float32),
        "parameter": np.full(2, 0.5, np.float32),
    }
    found = read_torch_state_dict(GOLDEN / name)
    assert_same(found, expected)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in found.values())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_scalars_of_both_generations_and_protocols(tmp_path, module, protocol):
    dtype = p.Call(p.Global("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None))
    raw = np.float64(0.1).tobytes()
    data = raw
    if protocol == 2:
        data = p.Call(p.Global("_codecs", "encode"), (raw.decode("latin1"), "latin1"))
    scalar = p.Call(p.Global(module, "scalar"), (dtype, data))
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(p.snapshot(p.module("EDMPrecond", sigma_data=scalar)))
    assert read_snapshot(path).attributes["sigma_data"] == 0.1


def test_storages_embedded_as_zip_files_are_read(tmp_path):
    # torch.save's zip format in place of the legacy stream inside _load_from_bytes
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    pid = ("storage", p.Global("torch", "FloatStorage"), "0", "cpu", 6)
    storage = p.torch_zip(p.Persistent(pid), {"0": array.tobytes()})
    path = tmp_path / "snapshot.pkl"
    ema = p.module("EDMPrecond", params={"w": p.tensor(array, storage)})
    path.write_bytes(p.snapshot(ema))
    np.testing.assert_array_equal(read_snapshot(path).params["w"], array)


def test_big_endian_archives_are_swapped(tmp_path):
    array = np.arange(3, dtype=">f4")
    pid = ("storage", p.Global("torch", "FloatStorage"), "0", "cpu", 3)
    rebuild = p.Global("torch._utils", "_rebuild_tensor_v2")
    tensor = p.Call(rebuild, (p.Persistent(pid), 0, (3,), (1,), False, p.ordered_dict()))
    path = tmp_path / "big.pt"
    path.write_bytes(p.torch_zip({"w": tensor}, {"0": array.tobytes()}, byteorder=b"big"))
    np.testing.assert_array_equal(read_torch_state_dict(path)["w"], np.arange(3, dtype=np.float32))


def test_untyped_storages_take_the_tensors_dtype(tmp_path):
    # _rebuild_tensor_v3 of recent versions
    array = np.arange(4, dtype=np.float32)
    pid = ("storage", p.Global("torch.storage", "UntypedStorage"), "0", "cpu", 16)
    args = (p.Persistent(pid), 1, (3,), (1,), False, p.ordered_dict(), p.Global("torch", "float32"))
    path = tmp_path / "untyped.pt"
    tensor = p.Call(p.Global("torch._utils", "_rebuild_tensor_v3"), args)
    path.write_bytes(p.legacy_file({"w": tensor}, [("0", 16, array.tobytes())]))
    np.testing.assert_array_equal(read_torch_state_dict(path)["w"], array[1:])


def test_nested_state_dict_needs_its_key(tmp_path):
    path = tmp_path / "wrapped.pt"
    pid = ("storage", p.Global("torch", "FloatStorage"), "0", "cpu", 1)
    rebuild = p.Global("torch._utils", "_rebuild_tensor")
    tensor = p.Call(rebuild, (p.Persistent(pid), 0, (), ()))
    path.write_bytes(p.torch_zip({"epoch": 3, "model": {"w": tensor}}, {"0": b"\0\0\x80?"}))
    with pytest.raises(UserError, match="holds more than tensors by name: epoch, model"):
        read_torch_state_dict(path)
    assert read_torch_state_dict(path, key="model")["w"] == 1
    with pytest.raises(UserError, match="no dict named 'ema'"):
        read_torch_state_dict(path, key="ema")


def test_golden_files_carry_a_source_that_would_raise():
    # without this the tests above would prove nothing about the embedded source
    for name in ("edm_lora", "ve_ncsnpp", "iddpm_adm"):
        assert p.SOURCE.encode() in (GOLDEN / f"snapshot_{name}.pkl").read_bytes()
    with pytest.raises(RuntimeError):
        exec(p.SOURCE)
