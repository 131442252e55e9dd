"""PNG and JPEG bytes to uint8 arrays, with errors that name the image."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image

from lora_diffusion_jax.errors import UserError

FORMATS = ("PNG", "JPEG")

# Pillow's mode -> channels of the array. An alpha channel is dropped when it is opaque throughout,
# which shows only when the pixels are read. Anything else (CMYK, 16 bit, float) is refused.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "RGBa": 3}
_MODES = {1: "L", 3: "RGB"}


def read_shape(file: BinaryIO, where: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) from an image's header; the pixels stay unread.

    Args:
        file: a seekable binary file positioned at the image's first byte.
        where: the image's name in error messages.

    Raises:
        UserError: no PNG or JPEG, a broken header, or a colour mode that is not handled.
    """
    with _named_errors(where), Image.open(file, formats=FORMATS) as image:
        return image.height, image.width, _channels(image, where)


def decode(
    data: bytes,
    where: str,
    shape: tuple[int, int, int],
    *,
    convert: bool = False,
) -> np.ndarray:
    """Decodes one image, which must have the given shape, to uint8 [H, W, C].

    The header is compared with shape before any pixel is decoded, so a file that declares a huge
    size costs nothing. Palette images become RGB; bilevel ones gray; 8 bits a channel otherwise.

    Args:
        data: the bytes of a PNG or JPEG file.
        where: the image's name in error messages.
        shape: (height, width, channels) of the data set; channels is 1 or 3.
        convert: turn gray into colour and CMYK into RGB where shape asks for another number of
            channels (for data sets that declare their channels), instead of refusing.

    Raises:
        UserError: not decodable, another size or number of channels, transparency.
    """
    with _named_errors(where), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        found = (image.height, image.width, shape[2] if convert else _channels(image, where))
        if found != shape:
            raise UserError(
                f"{where} is {describe_shape(found)}, but the first image of this data "
                f"set is {describe_shape(shape)}. All images must have one size and "
                "one number of channels: resize or convert them first."
            )
        if "A" in image.mode.upper() or "transparency" in image.info:
            _refuse_transparency(image, where)
        mode = _MODES[shape[2]]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(shape)


def describe_shape(shape: tuple[int, int, int]) -> str:
    """Words for (height, width, channels): '32x32 colour', height first."""
    kind = {1: "gray", 3: "colour"}.get(shape[2], f"with {shape[2]} channels")
    return f"{shape[0]}x{shape[1]} {kind}"


def _channels(image: Image.Image, where: str) -> int:
    if image.mode not in _CHANNELS:
        raise UserError(
            f"{where} has Pillow's colour mode {image.mode!r}; expected 8-bit gray, "
            "RGB or a palette. Convert it first, e.g. with Pillow's "
            "image.convert('RGB')."
        )
    return _CHANNELS[image.mode]


def _refuse_transparency(image: Image.Image, where: str) -> None:
    alpha = image.convert("RGBA").getchannel("A")
    lowest = alpha.getextrema()[0]
    if lowest < 255:
        raise UserError(
            f"{where} has transparent pixels (lowest alpha {lowest}), which an "
            "array of colours cannot hold. Put the images on a background first."
        )


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turns what Pillow raises on damaged files into one sentence that names the image."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} declares an absurd size: {error}. Remove it.") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        EOFError,
        OverflowError,
        MemoryError,
        ArithmeticError,
    ) as error:
        # Pillow has no common base class for "this file is damaged".
        raise UserError(
            f"{where} cannot be read as PNG or JPEG ({_first_line(error)}). Replace or remove it."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    if not text or "BytesIO" in text[0] or "cannot identify image file" in text[0]:
        return "not an image of these kinds, or damaged"
    return f"{type(error).__name__}: {text[0]}"
