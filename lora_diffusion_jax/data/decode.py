"""PNG and JPEG bytes to uint8 arrays, with errors that name the image."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image

from lora_diffusion_jax.errors import UserError

Shape = tuple[int, int, int]  # (height, width, channels); channels is 1 or 3

_FORMATS = ("PNG", "JPEG")
# Pillow's mode -> channels of the array. Whether an alpha channel is opaque, and can be dropped, shows
# only when the pixels are read. Other modes (CMYK, 16 bit, float) are refused.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBa": 3}
_MODES = {1: "L", 3: "RGB"}


def read_shape(file: IO[bytes], where: str) -> Shape:
    """Returns an image's shape from its header, without decoding the pixels.

    Args:
        file: a seekable binary file positioned at the image's first byte.
        where: the image's name in error messages.

    Raises:
        UserError: not a PNG or JPEG, a damaged header, or an unsupported colour mode.
    """
    with _decoding(where), Image.open(file, formats=_FORMATS) as image:
        return image.height, image.width, _channels(image, where)


def decode(data: bytes, where: str, shape: Shape, *, convert: bool = False) -> np.ndarray:
    """Decodes one image, which must have the given shape, to uint8 [H, W, C].

    The header is compared with shape before any pixel is decoded, so a file that declares a huge
    size costs nothing. Palette images become RGB, bilevel images gray.

    Args:
        data: the bytes of a PNG or JPEG file.
        where: the image's name in error messages.
        shape: the shape that all images of the data set have.
        convert: convert gray and CMYK images to the colours of `shape` instead of refusing them,
            for data sets that declare their number of channels.

    Raises:
        UserError: it cannot be decoded, has another shape, or has transparent pixels.
    """
    with _decoding(where), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        channels = shape[2] if convert else _channels(image, where)
        check_shape((image.height, image.width, channels), where, shape)
        if "A" in image.mode.upper() or "transparency" in image.info:
            lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
            if lowest != 255:
                raise UserError(
                    f"{where} has transparent pixels (lowest alpha {lowest}), which gray and RGB "
                    "cannot express. Put the images on a background first."
                )
        mode = _MODES[shape[2]]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(shape)


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


def _channels(image: Image.Image, where: str) -> int:
    if image.mode not in _CHANNELS:
        raise UserError(
            f"{where} has Pillow's colour mode {image.mode!r}; expected 8-bit gray, RGB or a palette. "
            "Convert it first, for example with Pillow's image.convert('RGB')."
        )
    return _CHANNELS[image.mode]


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Turns any error of a damaged file into one sentence that names the image."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Pillow raises a dozen unrelated types on damaged files, and zipfile others when the header
        # is read from a damaged ZIP.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "cannot identify image file" in reason:  # its text shows the address of a BytesIO
            reason = "another format, or damaged"
        raise UserError(
            f"{where} cannot be read as PNG or JPEG ({reason}). Replace or remove it."
        ) from error
