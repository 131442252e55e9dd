"""Untrusted files: JSON and ZIP entries read within limits, errors as one sentence.

A small file can describe a huge object: JSON takes some forty times its size as Python objects, deflate
packs a thousand bytes into one. What a file may cost is therefore decided before it is unpacked.
"""

import collections
import contextlib
import json
import math
import os
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.files import cannot_use

MAX_JSON = 4 << 20  # bytes of JSON text, unless the caller knows better
MAX_VALUES = 500_000  # values in it, at up to 80 bytes each
MAX_DEPTH = 64  # containers inside containers
MAX_DIGITS = 19  # of an integer that fits 64 bits
MAX_NAME = 255  # characters of a name, as in file systems
ADVICE = "Restore or replace it."

# bzip2 and lzma are left out: zipfile unpacks a whole chunk of them at once, to any size.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextlib.contextmanager
def refusing(where: str, doing: str = "read", advice: str = ADVICE) -> Iterator[None]:
    """Turns whatever a library raises over a damaged file into a UserError that names the file.

    Args:
        where: the file, as it stands in messages.
        doing: what cannot be done with it.
        advice: what to do, as a sentence.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise cannot_use(where, error.strerror or reason(error), advice) from error
    except Exception as error:
        raise UserError(f"{where} cannot be {doing} ({reason(error)}). {advice}") from error


def reason(error: Exception) -> str:
    """What an exception says, as one printable line."""
    first = next(iter(str(error).splitlines()), "")
    return printable(first, 200) or type(error).__name__


def is_text(name: str) -> bool:
    """Whether a name is Unicode text: bytes of a file name that are no UTF-8 stand in it as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def normal(name: str, where: str) -> str:
    """A name in Unicode's form NFC. Its time grows with the square of the accents on one letter.

    Raises:
        UserError: it has more than MAX_NAME characters.
    """
    if len(name) > MAX_NAME:
        raise UserError(
            f"{where} holds the name {printable(name, 100)!r}, of {len(name):,} characters; expected at most "
            f"{MAX_NAME}. Shorten it."
        )
    return unicodedata.normalize("NFC", name)


def read_file(path: str | os.PathLike, limit: int, advice: str = ADVICE) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        UserError: it is larger, is no regular file, or cannot be read.
    """
    where = printable(str(path), 300)
    with refusing(where, advice=advice):
        if not Path(path).is_file():  # reading a pipe or a device might never end
            found = "is not a regular file" if Path(path).exists() else "does not exist"
            raise UserError(f"{where} {found}. {advice}")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{where} is larger than the {limit:,} bytes that such a file may have. {advice}"
        )
    return data


def read_json(path: str | os.PathLike, *, infinite: bool = False, advice: str = ADVICE) -> Any:
    """The value of a JSON file; see `parse_json`."""
    data = read_file(path, MAX_JSON, advice)
    return parse_json(data, printable(str(path), 300), infinite=infinite, advice=advice)


def parse_json(
    data: bytes | str,
    where: str,
    *,
    limit: int = MAX_JSON,
    values: int = MAX_VALUES,
    infinite: bool = False,
    advice: str = ADVICE,
) -> Any:
    """The value of a JSON text.

    Args:
        data: the text, as UTF-8 if in bytes.
        where: its name in errors.
        limit: bytes that it may have.
        values: values, keys included, that it may hold.
        infinite: accept Python's Infinity, which JSON lacks and configs need.
        advice: what to do, as a sentence.

    Raises:
        UserError: not valid JSON, repeated keys, too large or too deep, NaN, or numbers that fit no
            64 bits.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    count = sum(map(raw.count, (b"[", b"{", b",", b":")))
    for found, most, unit in ((len(raw), limit, "bytes"), (count, values, "values")):
        if found > most:
            raise UserError(
                f"{where} is not valid JSON for its purpose: {found:,} {unit}, at most {most:,} are "
                f"expected. {advice}"
            )

    def word(text: str) -> float:
        if infinite and text != "NaN":
            return float(text)
        raise ValueError(f"{text} is not a JSON number")

    try:
        text = str(raw, "utf-8-sig")  # Windows tools put a byte order mark before it
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=word,
            object_pairs_hook=_object,
        )
        _check_depth(value)
        if "\\ud" in text.lower():  # half of a surrogate pair cannot be printed or written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({reason(error)}). {advice}") from error
    return value


def _integer(text: str) -> int:
    digits = len(text.lstrip("-"))
    if digits > MAX_DIGITS or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"an integer of {digits} digits")
    return number


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{printable(text, 40)} is too large for a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {printable(twice)!r} appears twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        contents = (item.values() if isinstance(item, dict) else item for item in level)
        level = [x for content in contents for x in content if isinstance(x, (dict, list))]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels")


def open_entry(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str, limit: int
) -> IO[bytes]:
    """Opens a ZIP entry that unpacks to at most `limit` bytes.

    zipfile never hands out more than the declared size; how much it unpacks to find that out depends on
    how much is asked for at once, so `read()` without a size is for `read_entry` alone.

    Raises:
        UserError: it declares more, or is packed by a method that cannot be read in parts.
    """
    if entry.compress_type not in _PACKINGS:
        raise UserError(
            f"{where} is compressed by method {entry.compress_type}; expected stored or deflated entries. "
            "Repack it with an ordinary ZIP tool."
        )
    if entry.file_size > limit:
        raise UserError(
            f"{where} is {entry.file_size:,} bytes when unpacked; expected at most {limit:,} bytes."
        )
    return archive.open(entry)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str, limit: int) -> bytes:
    """The bytes of a ZIP entry that unpacks to at most `limit` bytes.

    Raises:
        UserError: as `open_entry`, or it is shorter than declared. zipfile's own errors pass through.
    """
    with open_entry(archive, entry, where, limit) as file:
        data = file.read(entry.file_size)
    if len(data) != entry.file_size:
        raise UserError(
            f"{where} is truncated: {entry.file_size:,} bytes declared, {len(data):,} found."
        )
    return data
