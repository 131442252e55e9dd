"""PyTorch's file formats, the legacy stream and the zip archive, read with numpy."""

import io
import struct
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import printable
from lora_diffusion_jax.readers.machine import (
    Budget,
    Cursor,
    Machine,
    Maker,
    Refused,
    check_key,
)
from lora_diffusion_jax.readers.tensors import STORAGES, TENSORS, Storage, StorageType

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy file
PROTOCOL_VERSION = 1001
MAX_READ = 8 << 20  # bytes in one read of an archive: more is its directory gone wild
ZIP_MAGIC = b"PK\x03\x04"


def read_torch(
    data: memoryview, allowed: Mapping[tuple[str, str], Any], budget: Budget
) -> tuple[Any, int]:
    """Reads what torch.save wrote, of either format.

    Args:
        data: the file's bytes.
        allowed: globals beside those of tensors and storages, as in `Machine`.
        budget: of the whole file.

    Returns:
        (what was saved, bytes left over behind it); tensors in it are `Tensor`.

    Raises:
        Refused: another format, damage, or anything beyond the allowed globals.
    """
    if bytes(data[:4]) == ZIP_MAGIC:
        return _read_zip(data, allowed, budget), 0
    cursor = Cursor(data)
    return _read_legacy(cursor, allowed, budget), cursor.left


def nested_storage(budget: Budget) -> Maker:
    """The maker for torch.storage._load_from_bytes: a storage saved as a file inside the file."""

    def make(args: tuple) -> Storage:
        match args:
            case (memoryview() as data,):
                budget.spend("nested", len(data))
                storage, left = read_torch(data, STORAGES, budget)
                if type(storage) is Storage and left == 0:
                    return storage
        raise Refused("it is damaged: an embedded storage that is none")

    return Maker(make)


def _read_legacy(cursor: Cursor, allowed: Mapping, budget: Budget) -> Any:
    """Five pickles (magic, version, system, object, storage keys), then the storages' bytes."""
    magic = Machine(cursor, {}, budget).run()
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise Refused("it is foreign: a pickle, but not one that torch.save wrote")
    version = Machine(cursor, {}, budget).run()
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise Refused(f"it is foreign: torch.save version {printable(version)}")
    system = Machine(cursor, {}, budget).run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused(
            "it was written on a big-endian machine, which the legacy format does not undo"
        )
    storages = _Storages()
    value = Machine(cursor, {**TENSORS, **allowed}, budget, storages.resolve).run()
    keys = Machine(cursor, {}, budget).run()
    if type(keys) is not list:
        raise Refused("it is damaged: no list of storages")
    for key in keys:
        storage = storages.get(key)
        if cursor.number("<q") != storage.count or storage.data is not None:
            raise Refused("it is damaged: a storage of another size than declared")
        storage.data = cursor.take(storage.nbytes)
    storages.check_filled()
    return value


def _read_zip(data: memoryview, allowed: Mapping, budget: Budget) -> Any:
    """An archive with data.pkl and one uncompressed entry per storage."""
    try:
        with zipfile.ZipFile(_BoundedFile(data)) as archive:
            entries = _check_entries(archive, len(data))
            roots = [n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")]
            if len(roots) != 1:
                raise Refused(
                    "it is a zip archive, but not one that torch.save wrote (no data.pkl)"
                )
            if f"{roots[0]}constants.pkl" in entries:
                raise Refused("it is a TorchScript program, not saved tensors")
            order = entries.get(f"{roots[0]}byteorder")
            swap = order is not None and _entry(archive, order) not in (b"little",)
            storages = _Storages()

            def resolve(pid: Any) -> Storage:
                storage = storages.resolve(pid)
                if storage.data is None:
                    storage.data = _load_entry(
                        archive, entries, f"{roots[0]}data/{pid[2]}", storage
                    )
                    if swap:
                        storage.data = _swapped(storage)
                return storage

            cursor = Cursor(memoryview(_entry(archive, entries[f"{roots[0]}data.pkl"])))
            value = Machine(cursor, {**TENSORS, **allowed}, budget, resolve).run()
            if cursor.left:
                raise Refused("it is damaged: data behind the end of data.pkl")
            return value
    except _ZIP_ERRORS as error:
        raise Refused(f"it is a damaged zip archive: {printable(str(error))}") from error


_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    struct.error,
    OverflowError,
    KeyError,
    IndexError,
)


class _BoundedFile:
    """Bytes as a file for zipfile: nothing is copied whole, and absurd reads are refused."""

    def __init__(self, data: memoryview):
        self._data = data
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}
        position = origin[whence] + offset
        if position < 0:
            raise OSError("seek before the beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        left = max(len(self._data) - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_READ:
            raise Refused("it is a damaged zip archive: its directory is too large")
        start, self._position = self._position, self._position + size
        return bytes(self._data[start : start + size])


def _check_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name; they can only be what they weigh, so that nothing can unfold to more."""
    entries = {info.filename: info for info in archive.infolist()}
    for info in entries.values():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(
                f"its entry {printable(info.filename)} is compressed or encrypted, "
                "which torch.save never does (a zip bomb?)"
            )
    total = sum(info.file_size for info in archive.infolist())
    if total > size:
        raise Refused(f"its entries declare {total} bytes in a file of {size} (a zip bomb?)")
    return entries


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        data = b"".join(iter(lambda: file.read(MAX_READ), b""))
    if len(data) != info.file_size:
        raise Refused(f"its entry {printable(info.filename)} is truncated")
    return data


def _load_entry(archive: zipfile.ZipFile, entries: Mapping, name: str, storage: Storage) -> bytes:
    info = entries.get(name)
    if info is None or info.file_size != storage.nbytes:
        found = "is missing" if info is None else f"has {info.file_size} bytes"
        raise Refused(f"its entry {printable(name)} {found}; {storage.nbytes} bytes are declared")
    return _entry(archive, info)


def _swapped(storage: Storage) -> bytes:
    width = storage.dtype.itemsize
    return np.frombuffer(storage.data or b"", f"u{width}").byteswap().tobytes()


class _Storages:
    """The storages of one file by their keys."""

    def __init__(self):
        self._by_key: dict[str | int, Storage] = {}

    def resolve(self, pid: Any) -> Storage:
        """A storage from its persistent id: ('storage', type, key, location, count[, view])."""
        match pid:
            case (
                "storage",
                StorageType(dtype),
                (str() | int()) as key,
                str(),
                int() as count,
                *view,
            ):
                pass
            case _:
                raise Refused("it is damaged or foreign: a persistent id that is no storage")
        if view not in ([], [None]):
            raise Refused(
                "it holds storage views of PyTorch before 0.4; save it again with a newer one"
            )
        storage = self._by_key.setdefault(check_key(key), Storage(dtype, count))
        if not 0 <= count <= sys.maxsize or (storage.dtype, storage.count) != (dtype, count):
            raise Refused("it is damaged: a storage that is declared in two ways")
        return storage

    def get(self, key: Any) -> Storage:
        """The storage of that key."""
        if check_key(key) not in self._by_key:
            raise Refused("it is damaged: a storage that no tensor has")
        return self._by_key[key]

    def check_filled(self) -> None:
        """Refuses a file that lacks a storage."""
        if any(storage.data is None for storage in self._by_key.values()):
            raise Refused("it is truncated: a storage is missing")
