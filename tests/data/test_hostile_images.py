"""Images and archives made to cost time or memory: one sentence each, within seconds."""

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.data.decode import decode, read_shape
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError
from tests.small import deep_folders

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as outside of pytest
SHAPE = (64, 64, 3)
SECONDS = 10.0  # of the processor that one image may take
TOO_DEEP = "folders inside one another; expected at most 100"
MEMORY = 250 << 20  # bytes, beside the file's own


def encoded(form, size=64, **options):
    file = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(file, form, **options)
    return file.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(content):
    return segment(0xE1, b"Exif\0\0" + content)


def many_scans(count):
    """A progressive JPEG whose last scan, an empty refinement of a few bytes, is repeated."""
    whole = encoded("JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    tables = whole.rindex(b"\xff\xc4")
    scan = whole[min(start, tables) if tables > start - 200 else start : -2]
    return whole[:-2] + scan * count + whole[-2:]


def overlapping_exif():
    """Fields of EXIF that all have the same bytes, and more of them than the file."""
    fields = b"".join(struct.pack("<HHLL", 1000 + i, 7, 60_000, 0) for i in range(5000))
    return exif(b"II*\0" + struct.pack("<LH", 8, 5000) + fields + bytes(4))


def hidden_scans():
    """A segment that looks like the image's end stands before the scans."""
    whole = many_scans(100_000)
    start = whole.rindex(b"\xff\xc4", 0, 3000)
    return whole[:start] + segment(0xEF, b"\xff\xd9\xff\xd9") + whole[start:]


def lossless_tags():
    return exif(b"MM\0*\0\0\0\x08" + struct.pack(">H", 0xFFFF))


def apng(frames):
    control = struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 1, 0, 0)
    return chunk(b"acTL", struct.pack(">II", frames, 0)) + chunk(b"fcTL", control)


CASES = {
    "scans": lambda: many_scans(100_000),
    "scans behind an end that is none": hidden_scans,
    "markers": lambda: JPEG[:-2] + b"\xff\x01\0\2" * (1 << 20) + JPEG[-2:],
    "segments": lambda: JPEG[:2] + segment(0xEF, b"") * (1 << 20) + JPEG[2:],
    "comments": lambda: JPEG[:2] + segment(0xFE, b"") * (1 << 20) + JPEG[2:],
    "fill bytes": lambda: JPEG[:2] + b"\xff" * (8 << 20) + JPEG[2:],
    "junk": lambda: JPEG[:2] + bytes(8 << 20) + JPEG[2:],
    "tables": lambda: JPEG[:2] + segment(0xDB, b"\0" + b"\1" * 64) * (1 << 18) + JPEG[2:],
    "joined EXIF": lambda: JPEG[:2] + exif(bytes(9000)) * 2000 + JPEG[2:],
    "EXIF on itself": lambda: JPEG[:2] + overlapping_exif() + JPEG[2:],
    "EXIF of many fields": lambda: JPEG[:2] + lossless_tags() + JPEG[2:],
    "a profile in parts": lambda: (
        JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(60_000)) * 1000 + JPEG[2:]
    ),
    "chunks": lambda: PNG[:33] + chunk(b"prVt", b"") * (1 << 17) + PNG[33:],
    "chunks of pixels": lambda: PNG[:33] + chunk(b"IDAT", b"") * (1 << 17) + PNG[33:],
    "chunks of text": lambda: PNG[:33] + chunk(b"tEXt", b"k\0" + b"v" * 99) * (1 << 17) + PNG[33:],
    "chunks behind": lambda: PNG[:-12] + chunk(b"tEXt", b"k\0v") * (1 << 17) + PNG[-12:],
    "EXIF in a PNG": lambda: PNG[:33] + chunk(b"eXIf", overlapping_exif()[10:]) + PNG[33:],
    "frames": lambda: PNG[:33] + apng(1 << 31) + PNG[33:],
    "65,535 pixels wide": lambda: JPEG.replace(
        struct.pack(">HH", 64, 64), struct.pack(">HH", 65_535, 65_535)
    ),
    "2^31 pixels wide": lambda: PNG[:8] + chunk(b"IHDR", b"\x7f\xff\xff\xff" * 2 + b"\x08\2\0\0\0"),
    "WebP by another name": lambda: encoded("WEBP"),
    "GIF by another name": lambda: encoded("GIF"),
}
HARMLESS = {"EXIF on itself", "EXIF of many fields", "EXIF in a PNG", "frames"}


@pytest.mark.parametrize("case", CASES)
def test_work_that_an_image_asks_for_is_bounded(case):
    data = CASES[case]()
    tracemalloc.start()
    began = time.process_time()
    for read in (lambda: read_shape(io.BytesIO(data), "x"), lambda: decode(data, "x", SHAPE).shape):
        try:
            found = str(read())
        except UserError as error:
            found = str(error)
        assert found == str(SHAPE) or found.startswith("x ")
        assert found.isprintable()
    assert time.process_time() - began < SECONDS
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()
    assert (found == str(SHAPE)) == (case in HARMLESS), found


QUIET = """
import io, sys
from lora_diffusion_jax.data.decode import decode
try:
    decode(sys.stdin.buffer.read(), "x", (64, 64, 3))
except ValueError:
    pass
"""


@pytest.mark.parametrize("case", ["EXIF on itself", "65,535 pixels wide"])
def test_pillow_warns_of_nothing(case):
    """An error is one sentence without lines beside it; what is read has none."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET], input=CASES[case](), capture_output=True, check=True
    )
    assert done.stderr == b""


@pytest.mark.parametrize(
    "case",
    [
        "scans",
        "scans behind an end that is none",
        "segments",
        "fill bytes",
        "joined EXIF",
        "chunks",
        "chunks of pixels",
    ],
)
def test_what_would_cost_most_is_refused(case):
    with pytest.raises(UserError, match=r"parts|scans"):
        decode(CASES[case](), "x", SHAPE)


def test_what_programs_write_is_read():
    for data in (
        encoded("JPEG", progressive=True, icc_profile=bytes(255 * 60_000)),
        many_scans(50),
        JPEG + np.random.default_rng(0).bytes(20 << 20),  # a phone's video behind the image
        JPEG[:2] + segment(0xEF, JPEG * 30) + JPEG[2:],  # previews
        encoded("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3),
        JPEG[:2] + exif(bytes(60_000)) * 255 + JPEG[2:],
    ):
        assert decode(data, "x", SHAPE).shape == SHAPE
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    scans = io.BytesIO()
    Image.fromarray(noise).save(scans, "PNG")
    whole = scans.getvalue()
    start = whole.index(b"IDAT")
    size = struct.unpack(">I", whole[start - 4 : start])[0]
    packed = whole[start + 4 : start + 4 + size]
    parts = b"".join(
        chunk(b"IDAT", packed[i : i + 1]) for i in range(size)
    )  # the smallest there are
    data = whole[: start - 4] + parts + whole[start + 8 + size :]
    np.testing.assert_array_equal(decode(data, "x", SHAPE), noise)


DEEP = "/".join("a" * 30_000)
NAMES = {
    "30,000 folders": ([f"{DEEP}/0.png"], "in 30,000 folders"),
    "thousands of them": ([f"{n}/{DEEP[:20_000]}/0.png" for n in range(300)], "folders"),
    "30,000 slashes": (["/" * 60_000 + "0.png"], None),
    "30,000 dots": (["./" * 30_000 + "0.png"], None),
    "30,000 parents": (["../" * 20_000 + "0.png"], "in 20,000 folders"),
    "back and forth": (["a/../" * 10_000 + "0.png"], "in 20,000 folders"),
    "twenty parents": (["../" * 20 + "0.png"], "leads out"),
    "backslashes": (["a\\" * 30_000 + "0.png"], "in 30,000 folders"),
    "absolute": (["/etc/passwd/0.png", "C:\\Windows\\0.png"], None),
    "a NUL": (["0.png\0.txt", "1.png"], None),
    "twice behind a NUL": (["0.png\0a", "0.png\0b"], "twice"),
    "only a NUL": (["\0.png"], None),
    "empty": ([""], None),
    "long": (["x" * 65_000 + ".png"], "65,004 characters"),
    "60,000 accents": (["e" + "\u0301" * 30_000 + ".png"], "30,005 characters"),
    "accents in any order": (["e" + "\u0301\u0323" * 15_000 + ".png"], "characters"),
    "accents in a name that is not too long": (["e" + "\u0301\u0323" * 120 + ".png"] * 1, None),
    "escapes": (["\x1b[2J\x07\u202e.png"], None),
    "hidden folders": ([f".{DEEP}/0.png", "1.png"], "in 30,000 folders"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_in_archives_cost_little(tmp_path, case):
    names, says = NAMES[case]
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, PNG)
    began = time.process_time()
    tracemalloc.start()
    for class_folders in (False, True):
        try:
            found = summarize(open_source(path=str(path), class_folders=class_folders))
            assert says is None or class_folders
        except UserError as error:
            found = str(error)
            assert len(found) < 2000
            assert class_folders or says is not None, found
        assert all(line.isprintable() for line in found.split("\n"))
    assert time.process_time() - began < SECONDS
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()
    if says:
        with pytest.raises(UserError, match=says):
            open_source(path=str(path))


@pytest.mark.parametrize("raw", [b"\xff\xfe.png", b"caf\xe9/0.png", b"\x80\x81"])
@pytest.mark.parametrize("flag", [0, 0x800])  # the second promises UTF-8
def test_names_that_are_no_utf8(tmp_path, raw, flag):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x" * len(raw), PNG)
    data = path.read_bytes().replace(b"x" * len(raw), raw)
    directory = data.index(b"PK\1\2")
    data = data[: directory + 8] + struct.pack("<H", flag) + data[directory + 10 :]
    path.write_bytes(data[:6] + struct.pack("<H", flag) + data[8:])
    if flag:
        with pytest.raises(UserError, match="cannot be unzipped"):
            open_source(path=str(path))
    else:  # then it is in the letters of the first PCs
        assert open_source(path=str(path))[0]["image"].shape == SHAPE


@pytest.mark.parametrize("top", ["a", ".a"])
def test_folders_inside_one_another_end(tmp_path, top):
    """Deeper than Python can recurse, and hidden ones as well."""
    (tmp_path / "0.png").write_bytes(PNG)
    with deep_folders(tmp_path, top), pytest.raises(UserError, match=TOO_DEEP):
        open_source(path=str(tmp_path))
