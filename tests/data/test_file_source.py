import io
import json
import os
import pathlib
import pickle
import struct
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_diffusion_jax.data.decode import decode
from lora_diffusion_jax.data.image_source import summarize
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError

RNG = np.random.default_rng(0)


def encode(array, form="PNG", mode=None, **options):
    image = Image.fromarray(np.squeeze(array))
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def pixels(height=6, width=6, channels=3):
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


ARRAYS = {"b/1.png": pixels(), "a/x/0.png": pixels(), "a/2.PNG": pixels(), "c.png": pixels()}
FILES = {name: encode(array) for name, array in ARRAYS.items()}
TABLE = {"labels": [["c.png", 2], ["a/2.PNG", 0], ["a/x/0.png", 4], ["b/1.png", 0]]}


def write(path, files, kind):
    """Writes {name: bytes} as a folder or a ZIP; returns what to give as data.path."""
    if kind == "zip":
        path = path / "data.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return str(path)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def with_labels(files, table=TABLE):
    return {**files, "dataset.json": json.dumps(table).encode()}


@pytest.fixture(params=["folder", "zip"])
def kind(request):
    return request.param


@pytest.fixture
def opened(tmp_path, kind):
    def open_(files, **options):
        return open_source(path=write(tmp_path, files, kind), **options)

    return open_


def test_images_come_in_sorted_order_with_their_labels(opened):
    source = opened(
        with_labels({**FILES, "notes.txt": b"x", "a/.hidden.png": b"x", "__MACOSX/._c.png": b"x"})
    )
    names = sorted(ARRAYS)
    assert names == ["a/2.PNG", "a/x/0.png", "b/1.png", "c.png"]
    assert len(source) == 4
    assert source.image_shape == (6, 6, 3)
    for i, name in enumerate(names):
        item = source[i]
        np.testing.assert_array_equal(item["image"], ARRAYS[name])  # PNG is lossless
        assert item["image"].dtype == np.uint8
        assert item["label"] == dict(TABLE["labels"])[name]
        assert item["label"].dtype == np.int32
        assert item["label"].shape == ()
    assert source.num_classes == 5  # largest label + 1, as in EDM
    assert list(source.labels()) == [0, 4, 0, 2]
    np.testing.assert_array_equal(source[-1]["image"], ARRAYS["c.png"])
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize("table", [None, {"labels": None}])
def test_no_labels_means_no_classes(opened, table):
    source = opened(FILES if table is None else with_labels(FILES, table))
    assert source.num_classes == 0
    assert source.class_names == ()
    assert source[2]["label"] == 0


def test_gray_jpeg_oblong_and_bilevel_images(tmp_path, kind):
    gray = np.tile(np.arange(12, dtype=np.uint8)[None, :, None] * 20, (5, 1, 1))
    bilevel = encode(gray, mode="1")
    source = open_source(
        path=write(
            tmp_path,
            {
                "0.jpg": encode(gray, "JPEG", quality=100),
                "1.jpeg": encode(gray, "JPEG", quality=100),
                "2.png": encode(gray),
                "3.png": bilevel,
            },
            kind,
        )
    )
    assert source.image_shape == (5, 12, 1)
    np.testing.assert_allclose(source[0]["image"].astype(int), gray, atol=3)  # JPEG is lossy
    np.testing.assert_array_equal(source[2]["image"], gray)
    assert set(np.unique(source[3]["image"])) <= {0, 255}


def test_palette_and_opaque_alpha_become_rgb(opened):
    few = RNG.integers(0, 2, (6, 6, 3), np.uint8) * 255  # 8 colours survive a palette
    image = Image.fromarray(few)
    opaque = np.concatenate([few, np.full((6, 6, 1), 255, np.uint8)], -1)
    palette = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(palette, "PNG")
    source = opened({"0.png": palette.getvalue(), "1.png": encode(opaque)})
    assert source.image_shape == (6, 6, 3)
    np.testing.assert_array_equal(source[0]["image"], few)
    np.testing.assert_array_equal(source[1]["image"], few)


def test_transparency_is_refused_by_name(opened):
    rgba = np.concatenate([pixels(), np.full((6, 6, 1), 254, np.uint8)], -1)
    source = opened({"glass.png": encode(rgba)})
    with pytest.raises(UserError, match=r"glass\.png has transparent pixels"):
        source[0]


def test_transparent_palette_entry_is_refused():
    image = Image.fromarray(pixels()).convert("P")
    file = io.BytesIO()
    image.save(file, "PNG", transparency=int(np.asarray(image)[0, 0]))
    with pytest.raises(UserError, match="transparent"):
        decode(file.getvalue(), "p.png", (6, 6, 3))


@pytest.mark.parametrize(
    ("mode", "form", "found"), [("CMYK", "JPEG", "colour mode 'CMYK'"), ("I;16", "PNG", "16 bits")]
)
def test_other_colour_modes_are_refused(opened, mode, form, found):
    image = Image.new(mode, (6, 6))
    file = io.BytesIO()
    image.save(file, form)
    name = "odd.jpg" if form == "JPEG" else "odd.png"
    with pytest.raises(UserError, match=rf"odd.* has .*{found}.*[Cc]onvert"):
        opened({name: file.getvalue()})


BAD = {
    "truncated header": ({**FILES, "b/1.png": FILES["b/1.png"][:20]}, r"b/1\.png cannot be read"),
    "not an image": ({**FILES, "b/1.png": b"hello"}, r"b/1\.png cannot be read as PNG or JPEG"),
    "empty file": ({**FILES, "b/1.png": b""}, r"b/1\.png cannot be read"),
    "mixed sizes": (
        {**FILES, "b/1.png": encode(pixels(7, 6))},
        r"b/1\.png is 7x6 colour, but .*a/2\.PNG is 6x6 colour",
    ),
    "mixed channels": (
        {**FILES, "c.png": encode(pixels(channels=1))},
        r"c\.png is 6x6 gray, but .*a/2\.PNG is 6x6 colour",
    ),
    "other format": ({**FILES, "d.webp": b""}, r"d\.webp is neither PNG nor JPEG \(1 such"),
    "gif named png": ({"a.png": encode(pixels(), "GIF")}, r"a\.png cannot be read as PNG or JPEG"),
    "no images": ({"readme.txt": b"x"}, "holds no PNG or JPEG images"),
    "nothing": ({}, "holds no PNG or JPEG images"),
    "missing label": (
        with_labels(FILES, {"labels": TABLE["labels"][1:]}),
        r"c\.png has no label \(1 of 4 .* from dataset\.json",
    ),
    "label of nothing": (
        with_labels(FILES, {"labels": [*TABLE["labels"], ["z.png", 0]]}),
        r"dataset\.json labels .*z\.png, which is missing",
    ),
    "two labels": (
        with_labels(FILES, {"labels": [*TABLE["labels"], ["c.png", 0]]}),
        "gives 'c.png' the classes 2 and 0",
    ),
    "not json": ({**FILES, "dataset.json": b"{"}, r"dataset\.json is not valid JSON"),
    "not utf-8": (
        {**FILES, "dataset.json": b'{"labels": "\xff"}'},
        r"dataset\.json is not valid JSON",
    ),
    "deep json": ({**FILES, "dataset.json": b"[" * 100_000}, r"dataset\.json is not valid JSON"),
    "list": (with_labels(FILES, [1]), r"dataset\.json has no list 'labels'"),
    "no key": (with_labels(FILES, {"label": []}), r"dataset\.json has no list 'labels'"),
    "labels a dict": (with_labels(FILES, {"labels": {}}), "has no list 'labels'"),
    "empty labels": (with_labels(FILES, {"labels": []}), "has no label"),
    "float label": (with_labels(FILES, {"labels": [["c.png", 1.5]]}), r'entry 0 .*"c.png", 1.5'),
    "vector label": (with_labels(FILES, {"labels": [["c.png", [0, 1]]]}), "entry 0"),
    "true label": (with_labels(FILES, {"labels": [["c.png", True]]}), "entry 0"),
    "negative": (with_labels(FILES, {"labels": [["c.png", -1]]}), "entry 0"),
    "absurd class": (with_labels(FILES, {"labels": [["c.png", 10**12]]}), "entry 0"),
    "short entry": (with_labels(FILES, {"labels": [["c.png"]]}), "entry 0"),
    "nested json": (
        {"top/" + name: data for name, data in with_labels(FILES).items()},
        r"top/dataset\.json lies below the top",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(opened, case):
    files, message = BAD[case]
    with pytest.raises(UserError, match=message):
        opened(files)


def test_truncated_pixels_are_found_on_reading(opened):
    data = FILES["b/1.png"]
    source = opened({**FILES, "b/1.png": data[: len(data) - 40]})
    assert source[0]["image"].shape == (6, 6, 3)
    with pytest.raises(UserError, match=r"b/1\.png cannot be read as PNG or JPEG"):
        source[2]


def test_zip_inside_zip_is_named(tmp_path):
    inner = write(tmp_path, FILES, "zip")
    (tmp_path / "folder").mkdir()
    files = {**FILES, "more/inner.zip": pathlib.Path(inner).read_bytes()}
    with pytest.raises(UserError, match=r"contains a ZIP file, 'more/inner\.zip'"):
        open_source(path=write(tmp_path / "folder", files, "zip"))
    with pytest.raises(UserError, match=r"contains a ZIP file, 'data\.zip'.*Give that file"):
        open_source(path=str(tmp_path))


def test_damaged_zip_files(tmp_path):
    path = tmp_path / "bad.zip"
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"bad\.zip cannot be unzipped .* Give a folder or a ZIP"):
        open_source(path=str(path))
    whole = write(tmp_path, FILES, "zip")
    data = bytearray(pathlib.Path(whole).read_bytes())
    path.write_bytes(data[:-30])
    with pytest.raises(UserError, match=r"bad\.zip cannot be unzipped .* Give a folder or a ZIP"):
        open_source(path=str(path))
    start = data.index(b"b/1.png") + 60  # inside the compressed image
    data[start : start + 4] = bytes(255 - byte for byte in data[start : start + 4])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"b/1\.png"):
        open_source(path=str(path))[2]


def test_entry_that_declares_a_huge_size_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.png", "w", force_zip64=True) as file,
    ):
        for _ in range(300):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match=r"a\.png holds 314,572,800 bytes; expected at most"):
        open_source(path=str(path))


def test_same_name_twice_in_a_zip(tmp_path):
    path = tmp_path / "twice.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns about what this test is for
        archive.writestr("a.png", FILES["c.png"])
        archive.writestr("a.png", FILES["b/1.png"])
    with pytest.raises(UserError, match=r"holds 'a\.png' twice"):
        open_source(path=str(path))


def test_missing_path_says_what_is_there(tmp_path):
    write(tmp_path, FILES, "folder")
    with pytest.raises(UserError, match=r"imgs does not exist; .* holds a, b, c\.png"):
        open_source(path=str(tmp_path / "imgs"))


def test_class_folders_are_taken_only_when_asked_for(opened):
    files = {f"{name}/{i}.png": FILES["c.png"] for name in ("dog", "cat") for i in range(2)}
    source = opened(files)
    assert source.num_classes == 0
    source = opened(files, class_folders=True)
    assert source.class_names == ("cat", "dog")
    assert list(source.labels()) == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"c\.png has no label .* from names of the folders"):
        opened({**files, "c.png": FILES["c.png"]}, class_folders=True)


def test_folders_are_numbered_in_natural_order(opened):
    names = ["10", "9", "2b", "010", "0", "a2", "a10", "A1", "\u0663"]
    source = opened(
        {f"{n}/{i}.png": FILES["c.png"] for n in names for i in range(2)}, class_folders=True
    )
    assert source.class_names == ("0", "2b", "9", "010", "10", "A1", "a2", "a10", "\u0663")
    assert list(source.labels()) == [
        source.class_names.index(n) for n in sorted(names) for _ in range(2)
    ]


@pytest.mark.parametrize(
    "names",
    [["-10", "-2", "-1", "0", "3", "10"], ["-0.5", "0.25", "0.5", "1", "1.125"], ["x0.5", "x0.25"]],
)
def test_numbers_are_in_the_order_of_their_values(opened, names):
    source = opened(
        {f"{n}/{i}.png": FILES["c.png"] for n in names for i in "01"}, class_folders=True
    )
    assert list(source.class_names) == names


def test_outer_folders_are_no_classes(opened):
    files = {f"my/data/{c}/sub/{i}.png": FILES["c.png"] for c in ("dog", "cat") for i in range(2)}
    source = opened({**files, "my/readme.txt": b"x", "my/data/notes.txt": b"x"}, class_folders=True)
    assert source.class_names == ("cat", "dog")
    assert source.label_origin == "names of the folders in my/data"
    assert source.left_out == 2
    assert "Left out:    2 files" in summarize(source)


def test_one_class_folder_is_an_error(opened):
    with pytest.raises(UserError, match="All images lie in .*/x/y, .* at least two class folders"):
        opened({f"x/y/{i}.png": FILES["c.png"] for i in range(2)}, class_folders=True)


def test_an_empty_class_folder_is_an_error(tmp_path):
    files = {f"{c}/0.png": FILES["c.png"] for c in ("ant", "cat")}
    write(tmp_path, files, "folder")
    (tmp_path / "bee").mkdir()
    with pytest.raises(UserError, match=r"/bee is a class folder without images .* or remove it"):
        open_source(path=str(tmp_path), class_folders=True)
    assert open_source(path=str(tmp_path)).num_classes == 0
    path = write(tmp_path, files, "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("bee")
    with pytest.raises(UserError, match="/bee is a class folder without images"):
        open_source(path=path, class_folders=True)


def test_an_empty_class_beside_nested_ones_is_an_error(tmp_path):
    files = {f"{name}/1.png": FILES["c.png"] for name in ("all/cat/black", "all/cat/white")}
    write(tmp_path, files, "folder")
    assert open_source(path=str(tmp_path), class_folders=True).class_names == ("black", "white")
    (tmp_path / "all" / "dog").mkdir()
    with pytest.raises(UserError, match="/all/dog is a class folder without images"):
        open_source(path=str(tmp_path), class_folders=True)


def test_parts_of_a_data_set_are_no_classes(opened):
    files = {f"{part}/{c}/1.png": FILES["c.png"] for part in ("Train", "test") for c in ("a", "b")}
    with pytest.raises(
        UserError, match="holds the folders Train, test, .* as data.path, and another"
    ):
        opened(files, class_folders=True)
    assert opened({**files, "cat/1.png": FILES["c.png"]}, class_folders=True).num_classes == 3


def test_class_folders_on_disk_have_one_spelling_too(tmp_path):
    names = ["cafe\u0301/1.png", "cat\\1.png", "dog\\big/1.png"]
    source = open_source(
        path=write(tmp_path, dict.fromkeys(names, FILES["c.png"]), "folder"), class_folders=True
    )
    assert source.class_names == ("caf\u00e9", "cat", "dog")
    assert source.read(range(3))["image"].shape == (3, 6, 6, 3)


def test_a_class_that_no_config_can_name_is_refused(tmp_path):
    for name in (b"a", b"caf\xe9"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), name))
        with open(os.path.join(os.fsencode(tmp_path), name, b"0.png"), "wb") as file:
            file.write(FILES["c.png"])
    with pytest.raises(UserError, match=r"/caf\\udce9 is a class folder whose name is no UTF-8"):
        open_source(path=str(tmp_path), class_folders=True)
    assert len(open_source(path=str(tmp_path))) == 2  # names of images are not kept


def test_paths_hold_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGES", write(tmp_path, FILES, "folder"))
    assert len(open_source(path="$IMAGES")) == 4
    with pytest.raises(UserError, match=r"data\.path=gs://x/y is a URL"):
        open_source(path="gs://x/y")


def test_classes_without_images_are_known(opened):
    source = opened(with_labels(FILES))
    assert source.empty_classes() == [1, 3]


def test_spellings_of_names_are_one(tmp_path):
    """Windows' separators, './', and Unicode's two ways to write an accent."""
    path = tmp_path / "data.zip"
    stored = ["cat\\0.png", "./cat//1.png", "caf\u0065\u0301/2.png", "/cat/3.png"]
    labels = [["cat/0.png", 0], ["cat\\1.png", 0], ["caf\u00e9/2.png", 1], ["cat/3.png", 0]]
    with zipfile.ZipFile(path, "w") as archive:
        for name in stored:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, FILES["c.png"])
    source = open_source(path=str(path), class_folders=True)
    assert source.class_names == ("caf\u00e9", "cat")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    source = open_source(path=str(path))
    assert list(source.labels()) == [1, 0, 0, 0]
    np.testing.assert_array_equal(source[3]["image"], ARRAYS["c.png"])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a/0.png", "a\\0.png"], "holds 'a/0.png' twice"),
        (["e\u0301.png", "\u00e9.png"], "twice .*e.u0301"),
        (["../0.png"], "leads out"),
        (["a/..\\..\\0.png"], "leads out"),
    ],
)
def test_names_that_cannot_be_told_apart_or_lead_out(tmp_path, names, says):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, FILES["c.png"])
    with pytest.raises(UserError, match=says):
        open_source(path=str(path))


def test_names_are_printed_escaped(tmp_path):
    write(tmp_path, {"\x1b[2J\n.png": b"x"}, "folder")
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_source(path=str(tmp_path))
    assert str(caught.value).isprintable()


def test_images_are_told_by_their_content(opened):
    source = opened(
        {"0.png": FILES["c.png"], "1.jfif": FILES["b/1.png"], "2": encode(pixels(), "JPEG")}
    )
    assert len(source) == 3
    assert source.left_out == 0
    np.testing.assert_array_equal(source[1]["image"], ARRAYS["b/1.png"])


def test_content_counts_more_than_the_ending_of_another_format(opened):
    source = opened({"0.gif": FILES["c.png"], "1.WEBP": encode(pixels(), "JPEG")})
    assert len(source) == 2
    np.testing.assert_array_equal(source[0]["image"], ARRAYS["c.png"])


def test_hidden_files_are_counted(opened):
    hidden = {".cat/1.png": b"x", ".cat/x/2.png": b"x", "a/.b.png": b"x"}
    of_macos = {"__MACOSX/a/._2.png": b"x", "__MACOSX/1.png": b"x", "a/._2.png": b"x"}
    source = opened({**FILES, **hidden, **of_macos})
    assert (len(source), source.left_out) == (len(FILES), len(hidden))
    assert "Left out:    3 files that are no images, or hidden" in summarize(source)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_other_images_are_refused_whatever_their_ending(opened, form):
    with pytest.raises(UserError, match=r"x\.data is neither PNG nor JPEG \(1 such"):
        opened({"0.png": FILES["c.png"], "x.data": encode(pixels(), form)})


def test_links_lose_no_images(tmp_path):
    folder = tmp_path / "data"
    write(folder, {f"{c}/{i}.png": FILES["c.png"] for c in "ab" for i in range(2)}, "folder")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(FILES["c.png"])
    (folder / "c").symlink_to(tmp_path / "c")
    (folder / "a" / "2.png").symlink_to(tmp_path / "c" / "0.png")
    source = open_source(path=str(folder), class_folders=True)
    assert (len(source), source.class_names) == (6, ("a", "b", "c"))
    (folder / "a" / "3.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"a/3\.png is a link to 'nowhere\.png', which is missing"):
        open_source(path=str(folder))
    (folder / "a" / "3.png").unlink()
    for target in (folder / "b", folder):
        (folder / "d").symlink_to(target)
        with pytest.raises(UserError, match="are the same folder, through a link"):
            open_source(path=str(folder))
        (folder / "d").unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is neither a file nor a folder"):
        open_source(path=str(folder))


CORNERS = np.zeros((4, 6, 3), np.uint8)
CORNERS[0, 0], CORNERS[0, -1], CORNERS[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# EXIF orientation -> the upright image as it is stored: what row 0 and column 0 of it are, upright.
STORED = {
    1: CORNERS,  # top, left
    2: CORNERS[:, ::-1],  # top, right
    3: CORNERS[::-1, ::-1],  # bottom, right
    4: CORNERS[::-1],  # bottom, left
    5: CORNERS.transpose(1, 0, 2),  # left, top
    6: np.rot90(CORNERS, 1),  # right, top
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: np.rot90(CORNERS, -1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "PNG, EXIF last", "JPEG"])
def test_turned_images_are_put_upright(tmp_path, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = encode(STORED[orientation], form[:4].strip(","), exif=exif.tobytes(), **quality)
    if form == "PNG, EXIF last":
        start = data.index(b"eXIf") - 4
        length = 12 + int.from_bytes(data[start : start + 4])
        data = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    upright = decode(data, "x", (4, 6, 3)) if orientation < 5 or form != "PNG, EXIF last" else None
    if upright is None:  # the header showed the other shape: a sentence, not a turned image
        with pytest.raises(UserError, match="x is 6x4 colour, but the first image is 4x6"):
            decode(data, "x", (4, 6, 3))
        return
    np.testing.assert_allclose(upright.astype(int), CORNERS, atol=0 if form[0] == "P" else 30)
    (tmp_path / "x.png").write_bytes(data)
    assert open_source(path=str(tmp_path)).image_shape == (4, 6, 3)


def test_damaged_exif_says_nothing():
    data = encode(CORNERS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(data, "x", (4, 6, 3)), CORNERS)


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])  # gray, RGB, and both with alpha
def test_sixteen_bits_are_refused(opened, colour_type):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + RNG.bytes(8 * channels) for _ in range(4))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines))
    with pytest.raises(UserError, match=r"deep\.png has 16 bits per channel; expected 8\. Convert"):
        opened({"deep.png": data + chunk(b"IEND", b"")})


def test_transparent_images_on_a_background(tmp_path):
    alpha = np.arange(0, 252, 7, dtype=np.uint8).reshape(6, 6, 1)
    rgb = pixels()
    write(tmp_path, {"0.png": encode(np.concatenate([rgb, alpha], -1))}, "folder")
    prints = set()
    for name, behind in (("white", 255), ("black", 0), ("#808080", 128)):
        source = open_source(path=str(tmp_path), background=name)
        expected = (rgb * (alpha / 255.0) + behind * (1 - alpha / 255.0)).round()
        assert np.abs(source[0]["image"] - expected).max() <= 1  # Pillow rounds in between
        prints.add(source.fingerprint())
    assert len(prints) == 3  # other backgrounds are other data
    with pytest.raises(UserError, match="data.background=white, black or"):
        open_source(path=str(tmp_path))[0]
    for wrong in ("whit", "#12345678", "#12"):
        with pytest.raises(UserError, match="is not a colour; give white"):
            open_source(path=str(tmp_path), background=wrong)


def test_gray_images_stay_gray_on_a_gray_background_alone(tmp_path):
    """Whichever way PNG says that they are transparent."""
    gray = np.arange(36, dtype=np.uint8).reshape(6, 6, 1) + 1
    gray[0, 0] = 200
    alpha = np.where(gray == 200, 0, 255).astype(np.uint8)
    with_alpha = encode(np.concatenate([gray, alpha], -1))
    expected = np.where(gray == 200, 128, gray)
    for data in (encode(gray, transparency=200), with_alpha):
        found = decode(data, "x", (6, 6, 1), background="#808080")
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(UserError, match="x is gray, but data.background='red' is not"):
            decode(data, "x", (6, 6, 1), background="red")
        found = decode(data, "x", (6, 6, 3), background="red", convert=True)
        assert found[0, 0].tolist() == [255, 0, 0]


def test_a_declared_size_beyond_the_limit_is_refused():
    data = bytearray(FILES["c.png"])
    data[16:24] = struct.pack(">II", 5000, 5000)
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    with pytest.raises(UserError, match="x is 5000x5000; expected at most 16,777,216 pixels"):
        decode(bytes(data), "x", (5000, 5000, 3))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_cannot_be_read_in_parts_are_refused(tmp_path, method):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", FILES["c.png"])
    with pytest.raises(
        UserError, match=r"a\.png is compressed by method 1.; expected stored or deflated"
    ):
        open_source(path=str(path))


def test_class_folders_and_dataset_json_contradict(opened):
    with pytest.raises(UserError, match=r"dataset\.json, but data\.class_folders"):
        opened(with_labels(FILES), class_folders=True)


def test_summary(opened):
    source = opened(with_labels(FILES))
    text = summarize(source, max_classes=3)
    assert "4 of 6x6 colour" in text
    assert f"{sum(map(len, FILES.values()))} B; decoded 432 B" in text
    assert source.fingerprint() in text
    assert text.endswith("class 2: 1\n  ... and 2 more classes; 0 to 2 images each")


def test_fingerprint_follows_content_not_place(tmp_path):
    places = {}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        places[name] = tmp_path / name
    folder = open_source(path=write(places["one"], with_labels(FILES), "folder")).fingerprint()
    packed = open_source(path=write(places["two"], with_labels(FILES), "zip")).fingerprint()
    assert folder == packed
    assert len(folder) == 32
    table = {"labels": [[name, 0] for name in FILES]}
    other = open_source(path=write(places["three"], with_labels(FILES, table), "zip")).fingerprint()
    assert other != folder
    changed = ARRAYS["c.png"].copy()
    changed[0, 0, 0] ^= 1  # the PNG keeps its size or not; the pixels are hashed either way
    (places["one"] / "c.png").write_bytes(encode(changed))
    assert open_source(path=str(places["one"])).fingerprint() != folder


def test_reading_from_threads_forks_and_pickles(opened):
    source = opened(with_labels(FILES))
    wanted = [ARRAYS[name] for name in sorted(ARRAYS)]
    wrong = []

    def check(source):
        for _ in range(50):
            for i, array in enumerate(wanted):
                if not np.array_equal(source[i]["image"], array):
                    wrong.append(i)

    threads = [threading.Thread(target=check, args=(source,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(pickle.loads(pickle.dumps(source)))
    assert not wrong

    children = []
    for _ in range(2):  # parent and children read at once: a shared file position would clash
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python and JAX warn of forking with threads
            child = os.fork()
        if child == 0:
            status = 2
            try:
                check(source)
                status = len(wrong)
            finally:
                os._exit(min(status, 1))
        children.append(child)
    check(source)
    assert not wrong
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_damaged_bytes_never_raise_anything_but_a_user_error():
    rng = np.random.default_rng(1)
    originals = [
        encode(pixels(9, 9)),
        encode(pixels(9, 9), "JPEG"),
        encode(pixels(9, 9), mode="P"),
        encode(pixels(9, 9), "JPEG", progressive=True),
    ]
    messages = []
    for _ in range(400):
        for data in originals:
            damaged = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            try:
                assert decode(bytes(damaged), "x", (9, 9, 3)).shape == (9, 9, 3)
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith("x ") for message in messages)


@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_zip_never_raises_anything_but_a_user_error(tmp_path, count):
    whole = pathlib.Path(write(tmp_path, with_labels(FILES), "zip")).read_bytes()
    rng = np.random.default_rng(2)
    path = tmp_path / "damaged.zip"
    refused = 0
    for trial in range(count):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(damaged))] if trial % 10 == 0 else damaged)
        try:
            source = open_source(path=str(path))
            source.read(range(len(source)))
        except UserError:
            refused += 1
    assert refused > count / 2
