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
    Corrupt,
    Cursor,
    Machine,
    Maker,
    Refused,
    check_key,
)
from lora_diffusion_jax.readers.tensors import STORAGES, TENSORS, Storage, StorageType

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy file
PROTOCOL_VERSION = 1001
LEGACY_HEAD = b"\x80\x02\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little") + b"."
MAX_READ = 8 << 20  # bytes in one read of an archive; only a corrupt directory is larger
ZIP_MAGIC = b"PK\x03\x04"


def read_torch(
    data: memoryview, allowed: Mapping[tuple[str, str], Any], budget: Budget
) -> tuple[Any, int]:
    """Reads what torch.save wrote, in either format.

    Args:
        data: the file's bytes.
        allowed: globals besides those of tensors and storages, as in `Machine`.
        budget: of the whole file.

    Returns:
        (what was saved, bytes that follow its end); tensors in it are `Tensor`.

    Raises:
        Refused: another format, corrupt data, or globals that are not allowed.
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
        raise Corrupt("invalid embedded storage")

    return Maker(make)


def _read_legacy(cursor: Cursor, allowed: Mapping, budget: Budget) -> Any:
    """Five pickles (magic, version, system, object, storage keys), then the storages' bytes."""
    magic = Machine(cursor, {}, budget).run()
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise Refused("is a pickle, but not one that torch.save wrote")
    version = Machine(cursor, {}, budget).run()
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise Refused(f"has torch.save version {printable(version)}; expected {PROTOCOL_VERSION}")
    system = Machine(cursor, {}, budget).run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("was written on a big-endian machine in the legacy format; save it as zip")
    storages = _Storages()
    value = Machine(cursor, {**TENSORS, **allowed}, budget, storages.resolve).run()
    keys = Machine(cursor, {}, budget).run()
    if type(keys) is not list:
        raise Corrupt("no list of storages")
    for key in keys:
        storage = storages.get(key)
        if cursor.number("<q") != storage.count or storage.data is not None:
            raise Corrupt("a storage whose size is not the declared one")
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
                raise Refused("is a zip archive, but not one that torch.save wrote (no data.pkl)")
            if f"{roots[0]}constants.pkl" in entries:
                raise Refused("is a TorchScript program, not saved tensors")
            order = entries.get(f"{roots[0]}byteorder")
            swap = order is not None and archive.read(order) != b"little"
            storages = _Storages()

            def resolve(pid: Any) -> Storage:
                storage = storages.resolve(pid)
                if storage.data is None:
                    name = f"{roots[0]}data/{pid[2]}"
                    storage.data = _entry(archive, entries.get(name), name, storage.nbytes)
                    if swap:
                        elements = np.frombuffer(storage.data, f"u{storage.dtype.itemsize}")
                        storage.data = elements.byteswap().tobytes()
                return storage

            pickled = entries[f"{roots[0]}data.pkl"]
            data = memoryview(_entry(archive, pickled, "data.pkl", pickled.file_size))
            cursor = Cursor(data)
            value = Machine(cursor, {**TENSORS, **allowed}, budget, resolve).run()
            if cursor.left:
                raise Corrupt("bytes follow the end of data.pkl")
            return value
    except (
        *(zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError),
        *(struct.error, ArithmeticError, LookupError),
    ) as error:  # zipfile raises all of these on corrupt archives
        raise Corrupt(f"invalid zip archive ({printable(str(error))})") from error


class _BoundedFile(io.BytesIO):
    """Bytes as a file for zipfile, which refuses the huge reads that a corrupt directory asks for."""

    def read(self, size: int | None = -1) -> bytes:
        left = len(self.getbuffer()) - self.tell()
        if min(left, size if size is not None and size >= 0 else left) > MAX_READ:
            raise Corrupt("the directory of the zip archive is too large")
        return super().read(size)


def _check_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name; none is compressed, so that nothing can unfold to more than the file holds."""
    entries = {info.filename: info for info in archive.infolist()}
    for info in entries.values():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(
                f"has a compressed or encrypted entry {printable(info.filename)}, which torch.save "
                "never writes (a zip bomb?)"
            )
    total = sum(info.file_size for info in archive.infolist())
    if total > size:
        raise Refused(f"declares entries of {total} bytes in a file of {size} (a zip bomb?)")
    return entries


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, name: str, size: int) -> bytes:
    """The bytes of an entry that must have this size."""
    if info is None or info.file_size != size:
        found = "is missing" if info is None else f"has {info.file_size} bytes"
        raise Corrupt(f"entry {printable(name)} {found}; {size} bytes are declared")
    with archive.open(info) as file:
        data = b"".join(iter(lambda: file.read(MAX_READ), b""))
    if len(data) != size:
        raise Corrupt(f"entry {printable(name)} is truncated")
    return data


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
                str() | int() as key,
                str(),
                int() as count,
                *view,
            ):
                if view not in ([], [None]):
                    raise Refused(
                        "holds storage views of PyTorch before 0.4; save it with a newer one"
                    )
            case _:
                raise Corrupt("a persistent id that is not a storage")
        storage = self._by_key.setdefault(check_key(key), Storage(dtype, count))
        if not 0 <= count <= sys.maxsize or (storage.dtype, storage.count) != (dtype, count):
            raise Corrupt("a storage that is declared in two ways")
        return storage

    def get(self, key: Any) -> Storage:
        """The storage of that key."""
        if check_key(key) not in self._by_key:
            raise Corrupt("a storage that no tensor has")
        return self._by_key[key]

    def check_filled(self) -> None:
        """Raises Corrupt if a storage has no bytes."""
        if any(storage.data is None for storage in self._by_key.values()):
            raise Corrupt("a storage is missing")
