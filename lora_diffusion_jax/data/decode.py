"""PNG and JPEG bytes to uint8 arrays, with errors that name the image."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageColor

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.untrusted import reason

warnings.filterwarnings("ignore", module="PIL")  # what matters is an error here

Shape = tuple[int, int, int]  # (height, width, channels); channels of PNG and JPEG are 1 or 3

_FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")  # of these; other files show what they are by their content
MAX_BYTES = 2**26  # of an encoded image; noise of MAX_PIXELS in colour takes that as PNG
MAX_PIXELS = 2**24
# Work that a small file can ask for without end. Pillow reads each chunk or segment by itself, a few calls
# each, and keeps some of them; libjpeg passes over all pixels for each scan of a progressive JPEG.
_MAX_READS = {
    "PNG": 50_000,
    "JPEG": 4_000,
}  # chunks of 8 KiB fill MAX_BYTES; 255 segments of a profile
_MAX_SCANS = 100  # the usual progressive JPEG has 10
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd8\xff])")  # those with a segment, and the image's end
_SCAN, _END = b"\xda", b"\xd9"
# Pillow's mode -> channels of the array. Whether an alpha channel is opaque, and can be dropped, shows
# only when the pixels are read. Other modes (CMYK, 16 bit, float) are refused.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBa": 3}
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112  # EXIF's tag of how the camera was held; without it, or with 1, upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # these exchange width and height
HEAD = 32  # bytes that tell what a file is
_PNG = b"\x89PNG\r\n\x1a\n"
_MAGIC = {
    **{_PNG: "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"\x93NUMPY": "NumPy"},
    **{b"II*\0": "TIFF", b"MM\0*": "TIFF", b"P5\n": "PGM", b"P6\n": "PPM"},
    **{b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xffO\xffQ": "JPEG 2000"},
    **{b"\0\0\0\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL"},
}


def format_of(head: bytes) -> str:
    """What kind of image a file is by its first HEAD bytes, whatever its name; '' if none."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and head[8:11] in (b"avi", b"hei", b"hev", b"mif"):
        return "HEIF or AVIF"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def colour(text: str) -> tuple[int, int, int]:
    """The RGB of a name or '#rrggbb'.

    Raises:
        UserError: it is neither.
    """
    try:
        rgb = ImageColor.getrgb(text)
        if len(rgb) != 3:
            raise ValueError("it has an alpha")
    except ValueError as error:
        raise UserError(
            f"data.background={text!r} is not a colour; give white, black, another name or '#rrggbb'."
        ) from error
    return rgb[0], rgb[1], rgb[2]


def read_shape(file: IO[bytes], where: str) -> Shape:
    """Returns an image's shape from its header, upright, without decoding the pixels.

    Args:
        file: a seekable binary file positioned at the image's first byte.
        where: the image's name in error messages.

    Raises:
        UserError: not a PNG or JPEG, a damaged header, too many pixels, or an unsupported colour mode.
    """
    with _opened(file, where) as image:
        return _shape(image, _channels(image, where))


def decode(
    data: bytes, where: str, shape: Shape, *, convert: bool = False, background: str = ""
) -> np.ndarray:
    """Decodes one image, which must have the given shape, to uint8 [H, W, C].

    The header is compared with shape before any pixel is decoded, so a file that declares a huge
    size costs nothing. Palette images become RGB, bilevel images gray. Images that EXIF declares
    turned or mirrored, as phones write them, are put upright.

    Args:
        data: the bytes of a PNG or JPEG file.
        where: the image's name in error messages.
        shape: the shape that all images of the data set have.
        convert: convert gray and CMYK images to the colours of `shape` instead of refusing them,
            for data sets that declare their number of channels.
        background: the colour behind transparent pixels; '' refuses them.

    Raises:
        UserError: it cannot be decoded, has another shape, or has transparent pixels.
    """
    if not data.startswith(_PNG) and _has_many_scans(data):
        raise UserError(
            f"{where} is a JPEG of more than {_MAX_SCANS} scans, or too many parts. Save it again "
            "with an ordinary program, or remove it."
        )
    with _opened(io.BytesIO(data), where) as image:
        channels = shape[2] if convert else _channels(image, where)
        check_shape(_shape(image, channels), where, shape)
        image.load()
        check_shape(
            _shape(image, channels), where, shape
        )  # a PNG may have its EXIF behind the pixels
        orientation = _orientation(image)
        pixels: Image.Image = image
        if "A" in image.mode.upper() or "transparency" in image.info:
            pixels = _opaque(image, where, background, shape[2])
        if pixels.mode != _MODES[shape[2]]:
            pixels = pixels.convert(_MODES[shape[2]])
        if orientation in _UPRIGHT:
            pixels = pixels.transpose(_UPRIGHT[orientation])
        return np.asarray(pixels).reshape(shape)


def check_shape(shape: Shape, where: str, expected: Shape, first: str = "the first image") -> None:
    """Raises a UserError if the image `where` differs in shape from `first` of its data set."""
    if shape != expected:
        raise UserError(
            f"{where} is {describe_shape(shape)}, but {first} is {describe_shape(expected)}. All "
            "images must have one size and one number of channels: resize or convert them first, "
            "for example into a folder or ZIP for data.path."
        )


def describe_shape(shape: Shape) -> str:
    """Words for a shape: '32x32 colour', height first."""
    kind = {1: "gray", 3: "colour"}.get(shape[2], f"with {shape[2]} channels")
    return f"{shape[0]}x{shape[1]} {kind}"


@contextmanager
def _opened(file: IO[bytes], where: str) -> Iterator[Image.Image]:
    """A PNG or JPEG of 8 bits, and any error of a damaged file as one sentence that names it."""
    try:
        head = file.read(HEAD)
        file.seek(0)
        if head.startswith(_PNG) and head[24:25] == b"\x10":  # Pillow would drop the low bytes
            raise UserError(
                f"{where} has 16 bits per channel; expected 8. Convert the images first, for example "
                "with ImageMagick's -depth 8."
            )
        pieces = _Pieces(file, where, _MAX_READS["PNG" if head.startswith(_PNG) else "JPEG"])
        with Image.open(pieces, formats=_FORMATS) as image:  # type: ignore[arg-type]  # all it needs
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{where} is {image.height}x{image.width}; expected at most {MAX_PIXELS:,} pixels. "
                    "Resize the images first."
                )
            yield image
    except UserError:
        raise
    except Exception as error:
        # Pillow raises a dozen unrelated types on damaged files, and zipfile others when the header
        # is read from a damaged ZIP.
        text = reason(error)
        if "cannot identify image file" in text:  # its text shows the address of a BytesIO
            text = "another format, or damaged"
        raise UserError(
            f"{where} cannot be read as PNG or JPEG ({text}). Replace or remove it."
        ) from error


def _has_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more scans or segments than are allowed; videos that phones append do not count."""
    at, scans = 2, 0
    for _ in range(_MAX_READS["JPEG"]):
        found = _MARKER.search(data, at)
        if found is None or found[1] == _END or scans > _MAX_SCANS:
            return scans > _MAX_SCANS
        scans += found[1] == _SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return True


class _Pieces:
    """A binary file that is read in at most `limit` pieces."""

    def __init__(self, file: IO[bytes], where: str, limit: int):
        self._read, self.seek, self.tell = file.read, file.seek, file.tell
        self._where, self._limit, self._count = where, limit, 0

    def read(self, size: int = -1) -> bytes:
        self._count += 1
        if self._count > self._limit:
            raise UserError(
                f"{self._where} consists of too many parts, more than {self._limit:,} reads; expected fewer. "
                "Save it again with an ordinary program, or remove it."
            )
        return self._read(size)


def _shape(image: Image.Image, channels: int) -> Shape:
    """The shape of an upright image."""
    sides = image.height, image.width
    height, width = sides[::-1] if _orientation(image) in _SIDEWAYS else sides
    return height, width, channels


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif would read the pixels to look behind them
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing, and many cameras and programs write it
        return 1


def _opaque(image: Image.Image, where: str, background: str, channels: int) -> Image.Image:
    """The image without transparency: as it is if no pixel is transparent, else on the background."""
    rgba = image.convert("RGBA")
    lowest = rgba.getchannel("A").getextrema()[0]
    if lowest == 255:
        return image
    if not background:
        raise UserError(
            f"{where} has transparent pixels (lowest alpha {lowest}), which gray and RGB cannot express. "
            "Set their background: data.background=white, black or '#rrggbb'."
        )
    behind = colour(background)
    if channels == 1 and len(set(behind)) > 1:
        raise UserError(
            f"{where} is gray, but data.background={background!r} is not; choose a gray."
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, (*behind, 255)), rgba)


def _channels(image: Image.Image, where: str) -> int:
    if image.mode not in _CHANNELS:
        raise UserError(
            f"{where} has Pillow's colour mode {image.mode!r}; expected 8-bit gray, RGB or a palette. "
            "Convert it first, for example with Pillow's image.convert('RGB')."
        )
    return _CHANNELS[image.mode]
