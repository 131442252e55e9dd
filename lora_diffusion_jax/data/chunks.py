"""What array_record files unpack to, by the headers of their chunks: known before their reader unpacks.

The layout is that of Riegeli's records: blocks of 64 KiB, each with a header of 24 bytes that also interrupts
chunks, and chunks of a header of 40 bytes and the packed data. In files for random access a record is a
chunk; others hold the positions of all records, and padding.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_USABLE = _BLOCK - _BLOCK_HEADER
_HEADER = struct.Struct("<8xQ8xQQ")  # after hashes: bytes stored; kind and records; bytes unpacked


def unpacked_sizes(path: Path) -> Iterator[int]:
    """Yields the bytes that each chunk claims to unpack to; ends early where the file is cut off."""
    size, at = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file:
        while at < size and len(header := _read(file, at, _HEADER.size)) == _HEADER.size:
            stored, kind_and_records, unpacked = _HEADER.unpack(header)
            yield unpacked
            end = at + (kind_and_records >> 8)  # no two records begin at one place
            end += max(0, -end % _BLOCK - (_USABLE - 1))
            at = max(_behind(at, _HEADER.size + stored), end)


def _behind(at: int, size: int) -> int:
    """Where `size` bytes end that begin at `at`, with the headers of blocks between them."""
    return at + size + (size + (at + _USABLE - 1) % _BLOCK) // _USABLE * _BLOCK_HEADER


def _read(file: io.RawIOBase, at: int, size: int) -> bytes:
    """`size` bytes from `at` on without the headers of blocks; fewer at the file's end."""
    data = b""
    while len(data) < size:
        at += max(0, _BLOCK_HEADER - at % _BLOCK)
        file.seek(at)
        part = file.read(min(size - len(data), _BLOCK - at % _BLOCK))
        if not part:
            break
        data, at = data + part, at + len(part)
    return data
