"""JSON and ZIP entries of untrusted files: what is accepted, and one sentence for all else."""

import json
import os
import zipfile
import zlib

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.untrusted import MAX_DEPTH, parse_json, read_file, read_json, refusing

VALUE = {"a": [1, -2.5, None, True, "\u00e9\n", {"b": []}], "": 10**17}


def test_honest_json_is_read_as_pythons_own_reader_does(tmp_path):
    text = json.dumps(VALUE)
    assert parse_json(text, "x") == parse_json(text.encode(), "x") == json.loads(text) == VALUE
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "x") == VALUE  # Notepad's byte order mark
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == VALUE
    assert parse_json('{"s_max": Infinity}', "x", infinite=True) == {"s_max": float("inf")}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


BAD = {
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": ', "Expecting value"),
    "two values": (b"{} {}", "Extra data"),
    "not utf-8": (b'{"a": "\xff"}', "utf-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "deep": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "levels"),
    "very deep": (b"[" * 400_000, "JSON"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON"),
    "digits": (b"9" * 5000, "5000 digits"),
    "more than 64 bits": (b"[1000000000000000000000]", "22 digits"),
    "one more than 64 bits": (b"[9223372036854775808]", "19 digits"),
    "nan": (b"[NaN]", "NaN is not"),
    "infinity": (b"[-Infinity]", "-Infinity is not"),
    "overflow": (b"[1e999]", "1e999 is too large"),
    "same key": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
    "half a surrogate pair": (b'["\\ud800"]', "surrogates not allowed"),
    "many values": (b"[" + b"0," * 600_000 + b"0]", "600,001 values"),
    "long": (b" " * (5 << 20), "5,242,880 bytes"),
    "control characters": (b'["\x1b[2J"]', "Invalid control character"),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_one_sentence(case):
    data, says = BAD[case]
    with pytest.raises(UserError, match=r"^x\.json .*JSON") as caught:
        parse_json(data, "x.json")
    message = str(caught.value)
    assert says in message
    assert message.isprintable()
    assert len(message) < 400


def test_integers_of_64_bits_are_read():
    """Checkpoints have times in nanoseconds, which have 19 digits."""
    least, most = -(2**63), 2**63 - 1
    assert parse_json(f"[{least}, {most}]", "x") == [least, most]


def test_nan_is_refused_where_infinity_is_not():
    with pytest.raises(UserError, match="NaN"):
        parse_json("[NaN]", "x", infinite=True)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy with a few bytes overwritten, removed, repeated or cut off."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, count = int(rng.integers(len(found) or 1)), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0:
                found[at : at + count] = rng.bytes(count)
            case 1:
                del found[at : at + count]
            case 2:
                found[at:at] = found[at : at + 10 * count]
            case 3:
                found[at : at + 1] = rng.choice([b"{", b"[", b'"', b"\\", b"9", b",", b":"])
            case 4:
                del found[int(rng.integers(len(found) + 1)) :]
    return bytes(found)


def fuzz(read, data: bytes, path, count: int, seed: int = 0) -> int:
    """Reads damaged copies of a file: each gives a value or one sentence. Returns how many sentences."""
    rng, said = np.random.default_rng(seed), []
    for _ in range(count):
        path.write_bytes(mutate(data, rng))
        try:
            read(path)
        except UserError as error:
            said.append(str(error))
    assert all(len(text) < 1500 and "\x1b" not in text for text in said)
    return len(said)


@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_json_never_raises_anything_but_a_user_error(tmp_path, count):
    refused = fuzz(read_json, json.dumps(VALUE).encode(), tmp_path / "x.json", count)
    assert refused > count / 2


def test_pipes_devices_and_missing_files_are_sentences(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            read_file(path, 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    assert read_file(tmp_path / "long", 11) == b"x" * 11
    with pytest.raises(UserError, match="larger than the 10 bytes"):
        read_file(tmp_path / "long", 10)


@pytest.mark.parametrize(
    "error",
    [ValueError("a\nb"), KeyError(), zlib.error("x"), zipfile.BadZipFile("\x1b[2J"), OSError()],
)
def test_whatever_a_library_raises_becomes_one_printable_sentence(error):
    with (
        pytest.raises(UserError, match=r"file\b.*\. Do this\.$") as caught,
        refusing("file", advice="Do this."),
    ):
        raise error
    assert str(caught.value).isprintable()
