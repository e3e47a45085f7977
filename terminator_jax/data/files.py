"""Reads picture files as they are stored: PNG and JPEG, 8 or 16 bits, any number of channels.

What cannot be read without changing its values is refused.
"""

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from terminator_jax.data import deep_png
from terminator_jax.errors import InputError, one_line

SUFFIXES = (".png", ".jpg", ".jpeg")
# Other pictures, which are refused: nothing that was meant is left out unseen.
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

# What a picture is read as, by how it is stored; a palette becomes the colours that it stands for.
READ_AS = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "I;16": "I;16", "I": "I"}
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I": 1}
ORIENTATION = 0x0112  # of EXIF
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    height: int
    width: int
    channels: int
    dtype: np.dtype


def read_picture(path: Path) -> np.ndarray:
    """Reads a PNG or JPEG file as uint8 or uint16 `(height, width, channels)`.

    Transparency is a channel like the others. A JPEG is turned as its EXIF data says.

    Raises:
        InputError: if the file cannot be read without changing its values.
    """
    try:
        with path.open("rb") as file:
            return _decode(file)
    except Exception as error:  # pillow raises many kinds for a file that is not whole
        raise InputError(_unreadable(path, error)) from error


def decode_picture(data: bytes, name: str, *, max_pixels: int = 0) -> np.ndarray:
    """Decodes the bytes of a PNG or JPEG file as `read_picture` does.

    Args:
        data: the content of the file.
        name: what messages call it.
        max_pixels: how many pixels it may have; 0 for any number.

    Raises:
        InputError: if it cannot be read without changing its values, or has more pixels.

    Example:
        >>> decode_picture(b"GIF89a", "the picture")
        Traceback (most recent call last):
        ...
        terminator_jax.errors.InputError: the picture cannot be read: it is no whole PNG or JPEG ...
    """
    try:
        return _decode(io.BytesIO(data), max_pixels)
    except Exception as error:
        raise InputError(_unreadable(name, error)) from error


def read_header(path: Path) -> Header:
    """Reads the size and the kind of a picture without decoding it.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file, _opened(file) as picture:
            return _header(file, picture)
    except Exception as error:
        raise InputError(_unreadable(path, error)) from error


def _decode(file: BinaryIO, max_pixels: int = 0) -> np.ndarray:
    with _opened(file) as picture:
        mode, header = _mode(picture), _header(file, picture)
        if max_pixels and header.height * header.width > max_pixels:
            raise ValueError(
                f"it has {header.height}×{header.width} pixels, and {max_pixels:,} are allowed"
            )
        if header.dtype == np.uint16 and header.channels > 1:
            file.seek(0)
            return deep_png.read(file.read())
        upright = PIL.ImageOps.exif_transpose(picture) if _is_jpeg(picture) else picture
        pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
        return pixels.astype(header.dtype, copy=False).reshape(header[:3])


def _opened(file: BinaryIO) -> PIL.Image.Image:
    return PIL.Image.open(file, formats=("PNG", "JPEG"))


def _is_jpeg(picture: PIL.Image.Image) -> bool:
    return picture.format in ("JPEG", "MPO")  # MPO: several in one, as some cameras write


def _mode(picture: PIL.Image.Image) -> str:
    """Returns what to read the picture as; raises ValueError if that would change its values."""
    if picture.mode == "P":
        mode = "RGBA" if "transparency" in picture.info else "RGB"
    elif picture.mode in READ_AS:
        mode = READ_AS[picture.mode]
    else:
        raise ValueError(f"it is stored as {picture.mode}: convert it to RGB or grey")
    if getattr(picture, "n_frames", 1) > 1 and not _is_jpeg(picture):
        raise ValueError("it is animated: keep one of its pictures")
    return mode


def _header(file: BinaryIO, picture: PIL.Image.Image) -> Header:
    width, height = picture.size
    if _is_jpeg(picture) and picture.getexif().get(ORIENTATION) in TURNED:
        width, height = height, width
    channels, bits = CHANNELS[_mode(picture)], 8
    if picture.format == "PNG":
        bits, colours = _stored(file)
        channels = deep_png.CHANNELS[colours] if bits == 16 else channels
    return Header(height, width, channels, np.dtype(np.uint16 if bits == 16 else np.uint8))


def _stored(file: BinaryIO) -> tuple[int, int]:
    """Bits a channel and kind of colours of a PNG file, which pillow may show as others."""
    place = file.tell()
    file.seek(24)
    bits, colours = file.read(2)
    file.seek(place)
    return bits, colours


def _unreadable(name: str | Path, error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"{name} cannot be read: it is no whole PNG or JPEG file"
    return f"{name} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"
