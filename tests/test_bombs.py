"""Small files that describe huge things: what reading them may cost, measured in a process of its own."""

import bz2
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.readers import pickling as p
from tests.small import ROOT

LIMIT = 300 << 20  # bytes above what the program takes before it meets the file
MEASURE = """
import os, re, sys
from pathlib import Path
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation.images import open_npz
from lora_diffusion_jax.evaluation.references import load_reference
from lora_diffusion_jax.interop import load_pretrained
from lora_diffusion_jax.training.workdir import read_config
READ = {
    "info": lambda path: summarize(open_source(path=path)),
    "folders": lambda path: summarize(open_source(path=path, class_folders=True)),
    "tfds": lambda path: summarize(open_source("tiny", path)),
    "images": open_npz,
    "reference": load_reference,
    "import": load_pretrained,
    "config": read_config,
    "nothing": lambda path: None,
    "400 MiB": lambda path: b"x" * (400 << 20),
}
def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
for line in sys.stdin:
    kind, _, path = line.rstrip("\\n").partition("\\t")
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, said = memory("VmRSS"), "read"
    try:
        READ[kind](path)
    except UserError as error:
        said = str(error)
    print(memory("VmHWM") - before, repr(said), flush=True)
    os._exit(0)
"""


def png(height=4, width=4, extra=b"", pixels=None):
    """A gray PNG with chunks of one's own before the pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = zlib.compress(bytes(height * (width + 1))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated(head: bytes, piece: bytes, times: int, tail: bytes = b"") -> tuple[bytes, int, int]:
    """(raw deflate of head + times * piece + tail, its length, its CRC)."""
    packer, crc, size, out = zlib.compressobj(9, zlib.DEFLATED, -15), 0, 0, []
    for part in (head, *[piece] * times, tail):
        out.append(packer.compress(part))
        crc, size = zlib.crc32(part, crc), size + len(part)
    return b"".join(out) + packer.flush(), size, crc


def archive(path: Path, *entries: tuple[str, bytes, int, int, int]) -> None:
    """A ZIP of entries (name, packed, size, CRC, method) with whatever sizes are claimed."""
    body, directory = b"", b""
    for name, packed, size, crc, method in entries:
        fields = struct.pack(
            "<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(packed), size, len(name), 0
        )
        directory += b"PK\x01\x02\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        directory += name.encode()
        body += b"PK\x03\x04" + fields + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)


def stored(name: str, data: bytes) -> tuple[str, bytes, int, int, int]:
    return name, data, len(data), zlib.crc32(data), 0


def many(name: str, head: bytes, piece: bytes, times: int, tail: bytes = b""):
    return name, *deflated(head, piece, times, tail), 8


def npy_header(shape, dtype="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def bzip2_zip(folder):
    content = b'{"labels": [' + b" " * (1 << 27) + b"]}"
    entry = ("dataset.json", bz2.compress(content), len(content), zlib.crc32(content), 12)
    archive(folder / "data.zip", entry, stored("a.png", png()))


def json_zip(folder):
    entry = many("dataset.json", b'{"labels": [', b'{"":0},' * 4096, 1000, b"0]}")
    archive(folder / "data.zip", entry, stored("a.png", png()))


def many_names_zip(folder):
    """A dataset.json of as much as so many images allow."""
    names = [f"{'x' * 180}{i}.png" for i in range(8000)]
    text = json.dumps({"labels": [], "x": [[] for _ in range(300_000)]}).encode()
    archive(
        folder / "data.zip",
        *[stored(name, png()) for name in names],
        many("dataset.json", text[:-1] + b', "y": "', b"\\u0100" * 1000, 1500, b'"}'),
    )


def lying_zip(folder):
    name, packed, *_ = many("a.png", png(), bytes(1 << 20), 600)
    archive(folder / "data.zip", (name, packed, len(png()), zlib.crc32(png()), 8))


def huge_entry_zip(folder):
    archive(folder / "data.zip", many("a.png", png()[:-12], bytes(1 << 20), 600))


def large_png_zip(folder):
    """As many pixels as are allowed, and text and a colour profile that unpack to more."""
    bomb = zlib.compress(bytes(1 << 29))
    chunks = b""
    for kind, data in ((b"zTXt", b"k\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb)):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        chunks += struct.pack(">I", len(data)) + kind + data + crc
    archive(folder / "data.zip", stored("a.png", png(4096, 4096)), stored("b.png", png(4096, 4096)))
    (folder / "more").mkdir()
    (folder / "more" / "a.png").write_bytes(png(extra=chunks))


def folder_of_png(folder):
    large_png_zip(folder)
    (folder / "data.zip").unlink()


def folder_json(folder):
    (folder / "a.png").write_bytes(png())
    (folder / "dataset.json").write_bytes(b'{"labels": [' + b'{"":0},' * (1 << 22) + b"0]}")


def folder_png(folder):
    with (folder / "a.png").open("wb") as file:
        file.write(png())
        file.truncate(1 << 32)


def npz_of_zeros(folder):
    shape = (600, 1024, 1024, 1)
    entry = many("images.npy", npy_header(shape), bytes(1 << 20), 600)
    archive(folder / "data.npz", entry)


def npz_of_4_tb(folder):
    archive(folder / "data.npz", many("images.npy", npy_header((2**42,)), bytes(1 << 20), 100))


def npz_that_lies(folder):
    head = npy_header((10, 4, 4, 1))
    name, packed, *_ = many("images.npy", head, bytes(1 << 20), 600)
    shown = head + bytes(160)
    archive(folder / "data.npz", (name, packed, len(shown), zlib.crc32(shown), 8))


def npz_reference(folder):
    statistics = [
        stored(f"{k}.npy", _npy(v)) for k, v in (("mu", np.zeros(2)), ("sigma", np.eye(2)))
    ]
    text = '{"a": [' + '{"":0},' * 400_000 + "0]}"
    archive(folder / "data.npz", *statistics, many("meta.npy", _npy(np.array(text)), b"", 0))


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shared_module(folder):
    attributes = {f"a{i}": None for i in range(5000)}
    shared = p.Raw(p.ops(p.module("Linear", **attributes)) + b"r" + struct.pack("<I", 9))
    again = p.Raw(b"j" + struct.pack("<I", 9))
    children = {"c0": shared, **{f"c{i}": again for i in range(1, 19_000)}}
    (folder / "data.pkl").write_bytes(p.snapshot(p.module("EDMPrecond", children=children)))


def pickle_of_sets(folder):
    (folder / "data.pkl").write_bytes(b"\x80\x04](" + b"\x8f" * 3_000_000 + b"e.")


def pickle_of_views(folder):
    (folder / "data.pkl").write_bytes(b"\x80\x04](" + b"C\0" * 3_000_000 + b"e.")


def pickle_of_text(folder):
    text = ("\U00010000" + "x" * (1 << 20)).encode()
    one = b"X" + struct.pack("<I", len(text)) + text
    (folder / "data.pkl").write_bytes(b"\x80\x04](" + one * 31 + b"e.")


def safetensors_header(folder):
    text = b'{"a": [' + b'{"":0},' * 5_000_000 + b"0]}"
    (folder / "data.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def run_config(folder):
    (folder / "config.json").write_bytes(b"[" + b'{"":0},' * 5_000_000 + b"0]")


def tfds_spec(folder, features=None, info=None):
    home = folder / "tiny" / "1.0.0"
    home.mkdir(parents=True)
    plain = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (home / "dataset_info.json").write_text(info or json.dumps(plain))
    (home / "features.json").write_text(features or "{}")


def tfds_json(folder):
    tfds_spec(folder, features='{"a": [' + '{"":0},' * 5_000_000 + "0]}")


def tfds_most_json(folder):
    tfds_spec(folder, features='{"a": [' + "{}," * 240_000 + '"' + "\\u0100" * 500_000 + '"]}')


def tfds_records(folder, sizes):
    """Zeros for images, which array_record packs by zstd to a few bytes."""
    tfds_classes(folder, classes="10", records=str(len(sizes)))
    path = folder / "tiny" / "1.0.0" / "tiny-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for size in sizes:
        writer.write(bytes(size))
    writer.close()


def tfds_large_record(folder):
    tfds_records(folder, [600 << 20])


def tfds_many_records(folder):
    tfds_records(folder, [16 << 20] * 64)


def tfds_classes(folder, classes=str(10**12), records=str(10**15)):
    core = "tensorflow_datasets.core.features"
    image = {"pythonClassName": f"{core}.image_feature.Image"}
    image["image"] = {"dtype": "uint8", "shape": {"dimensions": ["4", "4", "1"]}}
    label = {"pythonClassName": f"{core}.class_label_feature.ClassLabel"}
    label["classLabel"] = {"numClasses": classes}
    whole = {"pythonClassName": f"{core}.features_dict.FeaturesDict"}
    whole["featuresDict"] = {"features": {"image": image, "label": label}}
    split = {"name": "train", "numBytes": "1", "shardLengths": [records]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    tfds_spec(folder, json.dumps(whole), json.dumps(info))


BOMBS = {
    bzip2_zip: "info",
    json_zip: "info",
    many_names_zip: "info",
    lying_zip: "info",
    huge_entry_zip: "info",
    large_png_zip: "info",
    folder_of_png: "info",
    folder_json: "info",
    folder_png: "info",
    npz_of_zeros: "images",
    npz_of_4_tb: "images",
    npz_that_lies: "images",
    npz_reference: "reference",
    shared_module: "import",
    pickle_of_sets: "import",
    pickle_of_views: "import",
    pickle_of_text: "import",
    safetensors_header: "import",
    run_config: "config",
    tfds_json: "tfds",
    tfds_most_json: "tfds",
    tfds_classes: "tfds",
    tfds_large_record: "tfds",
    tfds_many_records: "tfds",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What reading each bomb cost, in bytes, and what was said about it."""
    jobs = {"nothing": "nothing\t", "400 MiB": "400 MiB\t"}
    for make, kind in BOMBS.items():
        folder = tmp_path_factory.mktemp(make.__name__)
        make(folder)
        files = list(folder.glob("data.*"))
        jobs[make.__name__] = f"{kind}\t{files[0] if files else folder}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE],
        input="\n".join(jobs.values()),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=900,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(jobs), done.stderr[-2000:]
    return {
        name: (int(line.split(" ")[0]), line.partition(" ")[2])
        for name, line in zip(jobs, lines, strict=True)
    }


@pytest.mark.slow
def test_what_is_measured_is_memory(measured):
    assert measured["nothing"][0] < 20 << 20
    assert measured["400 MiB"][0] > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda make: make.__name__)
def test_peak_memory(bomb, measured):
    cost, said = measured[bomb.__name__]
    print(f"{bomb.__name__}: {cost >> 20} MiB, {said[:300]}")
    assert cost < LIMIT
    assert "\\n" not in said
    assert len(said) < 1000
