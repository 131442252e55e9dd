"""Hostile, damaged and foreign files end in one plain line, and nothing in them ever runs."""

import gzip
import io
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.interop.infer import infer_config
from lora_diffusion_jax.readers.pickles import read_snapshot, read_torch_state_dict
from tests.readers import pickling as p
from tests.readers.watching import nothing_runs

GOLDEN = Path(__file__).parents[1] / "golden"
GOOD = GOLDEN / "snapshot_edm_lora.pkl"
SENTINEL = "EXECUTED"


@pytest.fixture(autouse=True, scope="module")
def warm():
    """Loads what Python itself imports on first use, so that the watch sees files alone."""
    read_snapshot(GOOD)
    read_torch_state_dict(GOLDEN / "tensors_zip.pt")
    "".encode("cp437")  # zipfile's


@pytest.fixture(autouse=True)
def sentinel(warm, tmp_path, monkeypatch):
    """Runs each test where a payload would leave a file, and looks for it afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(SENTINEL).exists()


def refuse(data: bytes, *, reader=read_snapshot, says: str = "") -> str:
    """Reads a file of these bytes, which must end in one line that names it."""
    path = Path("file.pkl")
    path.write_bytes(data)
    started = time.process_time()
    with nothing_runs(), pytest.raises(UserError) as caught:
        reader(path)
    assert time.process_time() - started < 10
    message = str(caught.value)
    assert message.startswith("file.pkl")
    assert "\n" not in message
    assert len(message) < 500
    assert says in message
    return message


def call(module: str, name: str, *args) -> p.Call:
    return p.Call(p.Global(module, name), args)


TOUCH = f"open({SENTINEL!r}, 'w')"
CALLS = {
    "os.system": call("os", "system", f"touch {SENTINEL}"),
    "posix.system": call("posix", "system", f"touch {SENTINEL}"),
    "subprocess": call("subprocess", "check_call", ["touch", SENTINEL]),
    "eval": call("builtins", "eval", TOUCH),
    "exec": call("builtins", "exec", TOUCH),
    "python 2 eval": call("__builtin__", "eval", TOUCH),
    "open": call("builtins", "open", SENTINEL, "w"),
    "import": call("builtins", "__import__", "antigravity"),
    "compile": call("builtins", "compile", TOUCH, "x", "exec"),
    "getattr": call("builtins", "getattr", p.Global("os", "path"), "join"),
    "nested pickle": call("pickle", "loads", p.dumps(call("os", "system", f"touch {SENTINEL}"))),
    "torch.load": call("torch.serialization", "load", "evil.pt"),
    "torch.hub": call("torch.hub", "load", "evil/repo", "main"),
    "numpy.load": call("numpy", "load", "evil.npy"),
    "runpy": call("runpy", "run_path", "evil.py"),
    "pip": call("pip", "main", ["install", "evil"]),
    "partial": call("functools", "partial", p.Global("os", "system"), "true"),
    "attrgetter": call("operator", "attrgetter", "system"),
    "pathlib": p.Call(p.Global("pathlib", "Path.touch"), (SENTINEL,)),
    "copyreg": call("copyreg", "_reconstructor", p.Global("os", "system"), None, None),
    "module function": call("training.lora", "inject_trainable_lora", None),
    "dotted": call("torch.nn.modules.container", "Sequential.__init__.__globals__.get", "os"),
    "class of an allowed module": call("torch.nn.modules.container", "Module"),
}


@pytest.mark.parametrize("payload", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("place", ["top", "state", "storage", "zip storage", "torch", "torch zip"])
def test_calls_are_refused_wherever_they_stand(payload, place):
    load = p.Global("torch.storage", "_load_from_bytes")
    if place == "top":
        message = refuse(p.dumps(payload))
    elif place == "state":
        message = refuse(p.snapshot(p.module("EDMPrecond", sigma_data=payload)))
    elif place == "storage":
        inner = p.legacy_file(payload, [])
        message = refuse(p.snapshot(p.module("EDMPrecond", x=p.Call(load, (inner,)))))
    elif place == "zip storage":
        inner = p.torch_zip(payload, {})
        message = refuse(p.snapshot(p.module("EDMPrecond", x=p.Call(load, (inner,)))))
    elif place == "torch":
        message = refuse(p.legacy_file({"w": payload}, []), reader=read_torch_state_dict)
    else:
        message = refuse(p.torch_zip({"w": payload}, {}), reader=read_torch_state_dict)
    assert "refers to" in message
    assert "Nothing in it was run" in message


def test_stack_global_with_a_computed_name_is_refused():
    chain = p.Raw(p.ops("os") + p.ops("system") + b"\x93" + p.ops((f"touch {SENTINEL}",)) + b"R")
    refuse(p.dumps(chain), says="os.system")
    refuse(p.dumps(p.Raw(p.ops(["os"]) + p.ops("system") + b"\x93")), says="STACK_GLOBAL on a list")


@pytest.mark.parametrize(
    "opcodes",
    {
        "INST": b"(" + p.ops(f"touch {SENTINEL}") + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + p.ops(f"touch {SENTINEL}") + b"o",
        "EXT1": b"\x82\x01",
        "PERSID": b"Pos.system\n",
        "BINPERSID": p.ops(("module", "os", "system")) + b"Q",
        "NEXT_BUFFER": b"\x97",
        "NEWOBJ_EX": b"cos\nsystem\n)}\x92",
        "STRING": b"S'" + TOUCH.encode() + b"'\n",
        "unknown": b"\xff",
    }.items(),
    ids=lambda item: item[0],
)
def test_opcodes_that_data_does_not_need_are_refused(opcodes):
    refuse(p.dumps(p.Raw(opcodes[1])))


def test_build_and_items_reach_no_attribute_of_our_own_objects():
    for target in (p.Global("collections", "OrderedDict"), p.Global("torch", "FloatStorage")):
        for state in ({"make": p.Global("torch", "device")}, (None, {"dtype": 1}), "x"):
            refuse(p.dumps(p.Raw(p.ops(target) + p.ops(state) + b"b")), says="BUILD")
        refuse(p.dumps(p.Raw(p.ops(target) + p.ops("make") + p.ops(1) + b"s")), says="SETITEM")
        refuse(p.dumps(p.Raw(p.ops(target) + p.ops(1) + b"a")), says="APPEND")
    storage = p.Global("torch", "FloatStorage")
    refuse(p.dumps(p.Call(storage, ())), says="REDUCE on a StorageType")


def test_special_attribute_names_stay_plain_data():
    state = {"__class__": "x", "__setstate__": "x", "__reduce__": "x", "__dict__": {"a": 1}}
    Path("odd.pkl").write_bytes(p.snapshot(p.persistent("EDMPrecond", state)))
    with nothing_runs():
        node = read_snapshot("odd.pkl")
    assert type(node).__name__ == "ModuleNode"
    assert node.attributes == {}


def test_objects_filled_twice_or_made_with_arguments_are_refused():
    silu = p.Global("torch.nn.modules.activation", "SiLU")
    twice = p.Raw(p.ops(p.Call(silu, (), {"a": 1}, new=True)) + p.ops({"a": 2}) + b"b")
    refuse(p.dumps(twice), says="filled twice")
    refuse(p.dumps(p.Call(silu, ("x",), new=True)), says="made with arguments")


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"version": 7}, "version 7"),
        ({"type": "function"}, "without class or state"),
        ({"state": None}, "without class or state"),
        ({"class_name": 5}, "without class or state"),
    ],
)
def test_other_persistence_formats_are_refused(meta, says):
    refuse(p.snapshot(p.persistent("EDMPrecond", {}, **meta)), says=says)


FOREIGN = {
    "an empty file": b"",
    "a text file that begins with 'weights": b"weights go here\nsecond line\n",
    "a web page": b"\n<!DOCTYPE html><html>404</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a gzip file": gzip.compress(b"x"),
    "a zip archive": p.torch_zip({}, {}),
    "89 50 4e 47": b"\x89PNG\r\n\x1a\n\xff\xff",
    "begins with 'cos": b"cos\nsystem\n(S'touch x'\ntR.",  # a pickle of protocol 0
    "no network under 'ema'": p.dumps({"G": None, "D": None}),
    "a list, not a snapshot": p.dumps([1]),
    "a PyTorch file": p.legacy_file({}, []),
}


@pytest.mark.parametrize("says", FOREIGN)
def test_foreign_files_are_named_for_what_they_are(says):
    refuse(FOREIGN[says], says=says)


def test_missing_files_and_directories_are_named():
    for reader in (read_snapshot, read_torch_state_dict):
        with pytest.raises(UserError, match="none.pkl does not exist"):
            reader("none.pkl")
        with pytest.raises(UserError, match="is a directory"):
            reader("/")


@pytest.mark.parametrize("name", ["snapshot_edm_lora.pkl", "tensors_legacy.pt", "tensors_zip.pt"])
def test_files_cut_at_any_place_are_refused(name):
    data = (GOLDEN / name).read_bytes()
    reader = read_snapshot if name.endswith(".pkl") else read_torch_state_dict
    cuts = np.unique(np.linspace(0, len(data) - 1, 60).astype(int)).tolist()
    for cut in (*cuts, 1, 2, 10, len(data) - 2):
        refuse(data[:cut], reader=reader)


def test_bytes_behind_the_end_are_refused():
    refuse(GOOD.read_bytes() + b"x", says="1 bytes follow its end")
    refuse((GOLDEN / "tensors_legacy.pt").read_bytes() + b"x", reader=read_torch_state_dict)


DECLARED = {
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 62),
    "BINBYTES": b"B" + struct.pack("<I", (1 << 32) - 1),
    "BINUNICODE": b"X" + struct.pack("<I", (1 << 32) - 1),
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", (1 << 64) - 1),
    "FRAME": b"\x95" + struct.pack("<Q", (1 << 64) - 1),
    "LONG4": b"\x8b" + struct.pack("<i", (1 << 31) - 1),
    "negative LONG4": b"\x8b" + struct.pack("<i", -1),
    "endless name": b"c" + b"a" * 100_000,
}


@pytest.mark.parametrize("opcodes", DECLARED.values(), ids=DECLARED)
def test_sizes_that_the_file_does_not_have_are_refused_before_allocation(opcodes):
    refuse(p.dumps(p.Raw(opcodes)))


def test_memo_indices_cost_nothing():
    put = b"Nr" + struct.pack("<I", (1 << 32) - 1) + b"0"
    refuse(p.dumps(p.Raw(b"}r" + struct.pack("<I", (1 << 32) - 1))), says="'ema'")
    refuse(p.dumps(p.Raw(put)), says="opcode POP")
    refuse(p.dumps(p.Raw(b"h\x05")), says="BINGET")


def _repeated_tuple(levels: int) -> p.Raw:
    """((((), ()), ((), ())), ...): 2^levels empty tuples in a few bytes."""
    doubling = (b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return p.Raw(b")" + b"".join(doubling))


def test_structures_that_unfold_exponentially_are_never_unfolded():
    bomb = _repeated_tuple(60)
    refuse(p.dumps(p.Raw(b"}" + bomb.opcodes + p.ops(1) + b"s")), says="tuple as a dictionary key")
    refuse(p.dumps(p.Raw(b"\x8f(" + bomb.opcodes + b"\x90")), says="tuple as a dictionary key")
    refuse(p.snapshot(bomb), says="'ema'")
    # as an argument of the network it is carried along, but neither copied nor printed
    kwargs = {"img_resolution": bomb, "in_channels": 3, "out_channels": 3}
    model = p.module("SongUNet", _init_kwargs=kwargs, label_dropout=0)
    ema = p.module("EDMPrecond", children={"model": model})
    Path("bomb.pkl").write_bytes(p.snapshot(ema))
    with pytest.raises(UserError, match="img_resolution = a tuple"):
        infer_config(read_snapshot("bomb.pkl"))


def test_modules_inside_themselves_or_shared_without_end_are_refused():
    silu = p.ops(p.Call(p.Global("torch.nn.modules.activation", "SiLU"), (), new=True))
    loop = silu + b"q\x01" + p.ops({"_modules": {"child": p.Raw(b"h\x01")}}) + b"b"
    refuse(p.snapshot(p.Raw(loop)), says="contain themselves, or too many")
    doubled = silu
    for i in range(30):  # 2^30 modules in 2 kB
        again = {"a": p.Raw(doubled + b"q" + bytes([i])), "b": p.Raw(b"h" + bytes([i]))}
        doubled = silu + p.ops({"_modules": again}) + b"b"
    refuse(p.snapshot(p.Raw(doubled)), says="contain themselves, or too many")


def test_deep_nesting_needs_no_recursion():
    deep = p.Raw(b")" + b"\x85" * 300_000)
    refuse(p.dumps(deep), says="a tuple, not a snapshot")
    refuse(p.dumps(p.Raw(b"]" * 200_000 + b"a" * 199_999)), says="a list, not a snapshot")


def test_too_many_operations_are_refused():
    refuse(p.dumps(p.Raw(b"(" + b"}" * 2_000_000 + b"t")), says="more work")


def test_tensors_that_repeat_their_storage_are_bounded():
    ones = p.legacy_storage(np.ones(1, np.float32).tobytes())
    load = p.Call(p.Global("torch.storage", "_load_from_bytes"), (ones,))
    rebuild = p.Global("torch._utils", "_rebuild_tensor_v2")

    def ema(shape: tuple, strides: tuple, offset: int = 0) -> bytes:
        tensor = p.Call(rebuild, (load, offset, shape, strides, False, p.ordered_dict()))
        return p.snapshot(p.module("EDMPrecond", params={"w": tensor}))

    refuse(ema((1 << 30, 1 << 30), (0, 0)), says="more tensors")
    refuse(ema((0, 1 << 39, 1 << 39), (0, 0, 0)), says="more tensors")
    refuse(ema((2,), (1,)), says="beyond its storage")
    refuse(ema((1,), (1,), offset=1), says="beyond its storage")
    refuse(ema((1,), (1,), offset=-1), says="impossible shape")
    refuse(ema((2,), (-1,)), says="impossible shape")
    refuse(ema((1,) * 9, (1,) * 9), says="impossible shape")
    refuse(ema((1 << 50,), (0,)), says="impossible shape")
    refuse(ema((1, 1), (1,)), says="impossible shape")


def test_one_large_storage_read_again_and_again_is_bounded():
    storage = p.ops(p.legacy_storage(bytes(4_000_000)))
    load = p.ops(p.Global("torch.storage", "_load_from_bytes"))
    again = load + b"h\x01\x85R"
    many = p.Raw(b"(" + storage + b"q\x01" + again * 50 + b"t")
    refuse(p.dumps(many), says="more nested")


def test_lists_copied_again_and_again_are_bounded():
    pairs = p.ops([["k", None]] * 20_000)
    again = p.ops(p.Global("collections", "OrderedDict")) + b"h\x01\x85R"
    refuse(p.dumps(p.Raw(b"(" + pairs + b"q\x01" + again * 5_000 + b"t")), says="more work")


def test_colliding_keys_are_refused():
    prime = (1 << 61) - 1  # Python's integers hash modulo this
    keys = {i * prime: None for i in range(1, 5_000)}
    refuse(p.dumps(keys), says="int as a dictionary key")


def test_numpy_types_other_than_plain_numbers_are_refused():
    for kind in ("O8", "V1000000000", "S99999999", "f16", "c16", "M8"):
        dtype = p.Call(p.Global("numpy", "dtype"), (kind, False, True))
        refuse(p.dumps(dtype), says="not a plain number")
    dtype = p.Call(p.Global("numpy", "dtype"), ("f8", False, True), (3, "<", None))
    scalar = p.Call(p.Global("numpy.core.multiarray", "scalar"), (dtype, b"\0" * 7))
    refuse(p.dumps(scalar), says="invalid numpy scalar")


def test_zip_bombs_are_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", p.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert len(buffer.getvalue()) < 100_000
    refuse(buffer.getvalue(), reader=read_torch_state_dict, says="zip bomb")
    honest = p.torch_zip({"w": p.tensor(np.ones(1))}, {"0": bytes(4096)})
    refuse(_overlapping(honest, 500), reader=read_torch_state_dict)


def _overlapping(data: bytes, copies: int) -> bytes:
    """The same entries listed again and again in the archive's directory."""
    end = data.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[start : start + size] * copies
    count = struct.unpack("<H", data[end + 10 : end + 12])[0] * copies
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    return data[:start] + directory + tail


def test_archives_of_other_kinds_are_refused():
    script = p.torch_zip({}, {}, **{"constants.pkl": b""})
    refuse(script, reader=read_torch_state_dict, says="TorchScript")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", b"")
    refuse(buffer.getvalue(), reader=read_torch_state_dict, says="no data.pkl")


def test_storages_that_do_not_match_their_declaration_are_refused():
    pid = ("storage", p.Global("torch", "FloatStorage"), "0", "cpu", 2)
    rebuild = p.Global("torch._utils", "_rebuild_tensor_v2")
    tensor = p.Call(rebuild, (p.Persistent(pid), 0, (2,), (1,), False, p.ordered_dict()))
    read = read_torch_state_dict
    refuse(p.torch_zip({"w": tensor}, {}), reader=read, says="is missing")
    refuse(p.torch_zip({"w": tensor}, {"0": b"1234"}), reader=read, says="has 4 bytes")
    refuse(p.legacy_file({"w": tensor}, []), reader=read, says="a storage is missing")
    refuse(
        p.legacy_file({"w": tensor}, [("0", 3, bytes(12))]),
        reader=read,
        says="not the declared one",
    )
    refuse(p.legacy_file({"w": tensor}, [("1", 2, bytes(8))]), reader=read, says="no tensor has")
    huge = ("storage", p.Global("torch", "FloatStorage"), "0", "cpu", 1 << 60)
    refuse(p.legacy_file({"w": p.Persistent(huge)}, [("0", 1 << 60, b"")]), reader=read)


def _zip(value, storages: dict[str, bytes]) -> bytes:
    return p.torch_zip(value, storages)


def _legacy(value, storages: dict[str, bytes]) -> bytes:
    return p.legacy_file(value, [(key, len(data) // 4, data) for key, data in storages.items()])


def _view(shape: tuple, strides: tuple, offset: int = 0, kind: str = "Float", hooks=()) -> p.Call:
    """A tensor in the storage "0" of 4 elements."""
    storage = p.Persistent(("storage", p.Global("torch", f"{kind}Storage"), "0", "cpu", 4))
    arguments = (storage, offset, shape, strides, False, dict(hooks))
    return p.Call(p.Global("torch._utils", "_rebuild_tensor_v2"), arguments)


STATE_DICTS = {  # what stands in the file, and the words of its refusal
    "repeated": (_view((1 << 30, 1 << 30), (0, 0)), "more tensors"),
    "empty but huge": (_view((0, 1 << 39, 1 << 39), (0, 0, 0)), "more tensors"),
    "many views": ([_view((1 << 10, 1 << 10), (0, 0))] * 30, "more tensors"),
    "too long": (_view((5,), (1,)), "beyond its storage"),
    "too far": (_view((2,), (1,), offset=3), "beyond its storage"),
    "backwards": (_view((2,), (-1,)), "impossible shape"),
    "before": (_view((2,), (1,), offset=-1), "impossible shape"),
    "hooks": (_view((2,), (1,), hooks={"hook": 1}), "tensor with hooks"),
    "complex": (_view((2,), (1,), kind="ComplexFloat"), "refers to torch.ComplexFloatStorage"),
    "quantised": (_view((2,), (1,), kind="QInt8"), "refers to torch.QInt8Storage"),
    "two types": ([_view((2,), (1,)), _view((2,), (1,), kind="Int")], "declared in two ways"),
    "sparse": (p.Call(p.Global("torch._utils", "_rebuild_sparse_tensor"), (0,)), "_rebuild_sparse"),
    "a number": ([_view((2,), (1,)), 5], "more than tensors by name: w1. "),
    "nested": ({"w": _view((2,), (1,))}, "more than tensors by name: w0. "),
    "unfolding": ([_repeated_tuple(60), _view((2,), (1,))], "more than tensors by name: w0. "),
    "deep": (
        [p.Raw(b")" + b"\x85" * 300_000), _view((2,), (1,))],
        "more than tensors by name: w0. ",
    ),
    "work": (p.Raw(b"(" + b"}" * 2_000_000 + b"t"), "more work"),
    "colliding": ({i * ((1 << 61) - 1): None for i in range(1, 5_000)}, "as a dictionary key"),
    **{name: (p.Raw(opcodes), "") for name, opcodes in DECLARED.items()},
}


@pytest.mark.parametrize("write", [_zip, _legacy])
@pytest.mark.parametrize(("values", "says"), STATE_DICTS.values(), ids=STATE_DICTS)
def test_state_dicts_meet_the_limits_of_snapshots(write, values, says):
    values = values if type(values) is list else [values]
    tensors = {f"w{i}": value for i, value in enumerate(values)}
    refuse(write(tensors, {"0": bytes(16)}), reader=read_torch_state_dict, says=says)


def test_state_dicts_are_flat_and_named():
    tensor, storages = _view((2,), (1,)), {"0": bytes(16)}
    for value, says in (
        ([tensor], "holds a list, not a dict"),
        (tensor, "holds a Tensor, not a dict"),
        ({1: tensor}, "more than tensors by name: 1. "),
    ):
        refuse(p.torch_zip(value, storages), reader=read_torch_state_dict, says=says)


LIMITED = """
import resource, sys
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.readers.pickles import read_snapshot, read_torch_state_dict
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (700 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    try:
        (read_torch_state_dict if path.endswith(".pt") else read_snapshot)(path)
        print("read", path)
    except UserError as error:
        print("refused", error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_greediest_files_stay_within_memory_and_time_limits():
    """A process that may take 700 MB more than at its start reads each of them to its refusal."""
    files = {f"declared{i}.pkl": p.dumps(p.Raw(op)) for i, op in enumerate(DECLARED.values())}
    files["ops.pkl"] = p.dumps(p.Raw(b"(" + b"\x8f" * 3_000_000 + b"t"))
    files["text.pkl"] = p.dumps(p.Raw(b"(" + p.ops("\U0001f600" + "a" * 3_000_000) * 12 + b"t"))
    files["marks.pkl"] = p.dumps(p.Raw(b"(" * 3_000_000))
    files["longs.pkl"] = p.dumps(p.Raw(b"(" + p.ops(1 << 100) * 400_000 + b"t"))
    files["bomb.pt"] = _overlapping(p.torch_zip({}, {"0": bytes(1 << 16)}), 20_000)
    for name, data in files.items():
        Path(name).write_bytes(data)
    run = [sys.executable, "-c", LIMITED, *files]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    assert all(line.startswith("refused") for line in lines), lines


def test_the_watch_itself_sees_execution():
    with pytest.raises(AssertionError, match="compile"), nothing_runs():
        eval("1 + 1")
    with pytest.raises(AssertionError, match="open"), nothing_runs():
        Path("harmless").write_text("x")


def test_attributes_of_a_shared_module_are_charged_wherever_it_stands():
    """The copies of its attributes took 416 MB from a file of 96 kB."""
    shared = p.Raw(p.ops(p.module("Linear", **{f"a{i}": None for i in range(1000)})) + b"q\x09")
    children = {"c0": shared, **{f"c{i}": p.Raw(b"h\x09") for i in range(1, 2000)}}
    refuse(p.snapshot(p.module("EDMPrecond", children=children)), says="needs more work")


@pytest.mark.parametrize("opcodes", [b"\x8f", b"C\0"], ids=["sets", "bytes"])
def test_objects_that_weigh_more_than_others_cost_more(opcodes):
    refuse(b"\x80\x04](" + opcodes * 300_000 + b"e.", says="needs more work")


def test_text_is_charged_by_what_it_takes_in_memory():
    wide = "\U00010000" + "x" * (1 << 20)
    refuse(p.dumps([wide] * 9), says="needs more text")
