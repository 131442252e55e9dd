"""A small pickle writer for tests, opcode by opcode: honest files and any kind of bad ones."""

import dataclasses
import io
import struct
import zipfile
from typing import Any

import numpy as np

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
SOURCE = "raise RuntimeError('the source inside a snapshot was run')\n"


@dataclasses.dataclass
class Global:
    module: str
    name: str


@dataclasses.dataclass
class Call:
    """REDUCE, or NEWOBJ and BUILD where a state is given."""

    function: Any
    args: tuple
    state: Any = None
    new: bool = False


@dataclasses.dataclass
class Persistent:
    pid: Any


@dataclasses.dataclass
class Raw:
    opcodes: bytes


def dumps(value: Any, protocol: int = 4) -> bytes:
    """A whole pickle."""
    return bytes([0x80, protocol]) + ops(value) + b"."


def ops(value: Any) -> bytes:
    """The opcodes that push a value."""
    match value:
        case Raw(opcodes):
            return opcodes
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Persistent(pid):
            return ops(pid) + b"Q"
        case Call(function, args, state, new):
            built = ops(state) + b"b" if state is not None else b""
            return ops(function) + ops(args) + (b"\x81" if new else b"R") + built
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(ops, value)) + b"t"
        case list():
            return b"](" + b"".join(map(ops, value)) + b"e"
        case set():
            return b"\x8f(" + b"".join(map(ops, value)) + b"\x90"
        case dict():
            items = b"".join(ops(k) + ops(v) for k, v in value.items())
            return b"}(" + items + b"u"
    raise TypeError(type(value))


def legacy_storage(data: bytes, kind: str = "Float", count: int | None = None) -> bytes:
    """What torch.save writes for one storage in the legacy format."""
    count = len(data) // 4 if count is None else count
    pid = ("storage", Global("torch", f"{kind}Storage"), "0", "cpu", count, None)
    return legacy_file(Persistent(pid), [("0", count, data)])


def legacy_file(value: Any, storages: list[tuple[str, int, bytes]]) -> bytes:
    """A legacy PyTorch file: five pickles and the storages' bytes."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [MAGIC_NUMBER, 1001, system, value, [key for key, *_ in storages]]
    data = b"".join(struct.pack("<q", count) + raw for _, count, raw in storages)
    return b"".join(dumps(part, 2) for part in parts) + data


def torch_zip(value: Any, storages: dict[str, bytes], **entries: bytes) -> bytes:
    """What torch.save writes in the zip format; keywords add entries such as byteorder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", dumps(value, 2))
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def tensor(array: np.ndarray, storage: bytes | None = None) -> Call:
    """A float32 tensor as snapshots hold it."""
    array = np.asarray(array, np.float32)
    strides = tuple(s // 4 for s in array.strides)
    load = Global("torch.storage", "_load_from_bytes")
    storage = legacy_storage(array.tobytes()) if storage is None else storage
    args = (Call(load, (storage,)), 0, array.shape, strides, False, ordered_dict())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def ordered_dict() -> Call:
    return Call(Global("collections", "OrderedDict"), ())


def module(
    class_name: str,
    *,
    params: dict | None = None,
    buffers: dict | None = None,
    children: dict | None = None,
    **attributes: Any,
) -> Call:
    """A persistent object with a module's state."""
    state = {
        "_parameters": params or {},
        "_buffers": buffers or {},
        "_non_persistent_buffers_set": set(),
        "_modules": children or {},
        **attributes,
    }
    return persistent(class_name, state)


def persistent(name: str, attributes: Any, **meta: Any) -> Call:
    """A call of the persistence format's only function; keywords replace fields of its argument."""
    fields = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": name}
    function = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
    return Call(function, ({**fields, "state": attributes, **meta},))


def snapshot(ema: Any, **others: Any) -> bytes:
    """A snapshot file around a network."""
    return dumps(
        {"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}, **others}
    )
