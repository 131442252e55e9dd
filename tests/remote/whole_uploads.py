"""Imported in the process of gcp-storage-emulator: uploads keep all their bytes.

The emulator reads an upload with the parser of e-mails, which takes a carriage return at the end of the
content for part of the line break behind it. One checkpoint in some ten came back without its last byte.
"""

import json
import re

from gcp_storage_emulator import server

_read_data = server._read_data


def _split(raw: bytes, boundary: bytes) -> tuple[bytes, bytes, bytes]:
    """The metadata, the content, and the header of the content of an upload's two parts."""
    _, first, second = raw.split(b"--" + boundary, 2)
    meta = re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1]
    header, content = re.split(rb"\r?\n\r?\n", second, maxsplit=1)
    content = content[: content.rindex(b"--" + boundary + b"--")]
    return meta, content[: -2 if content.endswith(b"\r\n") and b"\r\n" in header else -1], header


def read_data(handler, query):
    """What the emulator's function of this name returns."""
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return _read_data(handler, query)
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
    raw = server._decode_raw_data(server._read_raw_data(handler), handler)
    meta, content, header = _split(raw, boundary)
    found = re.search(rb"Content-Type: *([^\s;]+)", header, re.IGNORECASE)
    return {
        "meta": json.loads(meta),
        "content": content,
        "content-type": found[1].decode() if found else "text/plain",
    }


server._read_data = read_data
