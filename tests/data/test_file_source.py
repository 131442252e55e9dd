import io
import json
import os
import pathlib
import pickle
import threading
import warnings
import zipfile

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


def test_damaged_zip_never_raises_anything_but_a_user_error(tmp_path):
    whole = pathlib.Path(write(tmp_path, with_labels(FILES), "zip")).read_bytes()
    rng = np.random.default_rng(2)
    path = tmp_path / "damaged.zip"
    refused = 0
    for trial in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(damaged))] if trial % 10 == 0 else damaged)
        try:
            source = open_source(path=str(path))
            source.read(range(len(source)))
        except UserError:
            refused += 1
    assert refused > 300
