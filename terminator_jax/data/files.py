"""Reads picture files of every kind that pillow or OpenCV knows, 8 or 16 bits a channel.

What a file is, its content decides and not its name. Values are kept: a palette and CMYK become the
colours that they stand for, transparency is a channel like the others, and of several pictures in
one file the first is read.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from terminator_jax.errors import InputError, one_line

# Kinds that are known by their first bytes and need no program outside of pillow.
FORMATS = (
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG",
    "PPM", "PSD", "QOI", "SGI", "TIFF", "WEBP",
)  # fmt: skip
# Of these pillow may keep 8 bits of 16, and OpenCV keeps all.
DEEP_FORMATS = ("JPEG2000", "PPM", "TIFF")
# What a picture is read as, by how it is stored.
READ_AS = {
    "1": "L", "L": "L", "LA": "LA", "La": "LA", "RGB": "RGB", "RGBX": "RGB", "CMYK": "RGB",
    "YCbCr": "RGB", "HSV": "RGB", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA", "I;16": "I;16",
    "I": "I",
}  # fmt: skip
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I": 1}
PHOTOGRAPHS = ("AVIF", "JPEG", "MPO", "WEBP")  # which a camera may have written turned
ORIENTATION = 0x0112  # of EXIF
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    height: int
    width: int
    channels: int
    dtype: np.dtype


def read_picture(path: Path) -> np.ndarray:
    """Reads a picture as uint8 or uint16 `(height, width, channels)`.

    A photograph is turned as its EXIF data says.

    Raises:
        InputError: if the file is no picture, is damaged, or has numbers of other kinds.
    """
    try:
        with path.open("rb") as file:
            return _decode(file)
    except Exception as error:  # pillow raises many kinds for a file that is not whole
        raise InputError(_unreadable(path, error)) from error


def decode_picture(data: bytes, name: str, *, max_pixels: int = 0) -> np.ndarray:
    """Decodes the content of a file as `read_picture` does.

    Args:
        data: the content of the file.
        name: what messages call it.
        max_pixels: how many pixels it may have; 0 for any number.

    Raises:
        InputError: as `read_picture`, or if it has more pixels.

    Example:
        >>> decode_picture(b"GIF89a", "the picture")
        Traceback (most recent call last):
        ...
        terminator_jax.errors.InputError: the picture cannot be read: it is no whole picture ...
    """
    try:
        return _decode(io.BytesIO(data), max_pixels)
    except Exception as error:
        raise InputError(_unreadable(name, error)) from error


def is_picture(file: BinaryIO) -> bool:
    """Returns whether a file begins as a picture does; what follows may be damaged.

    Example:
        >>> is_picture(io.BytesIO(b"once upon a time"))
        False
    """
    try:
        with _opened(file):
            return True
    except PIL.UnidentifiedImageError:
        return False
    except Exception:  # whatever pillow finds wrong with what it knows
        return True


def is_named_as_picture(path: Path) -> bool:
    """Returns whether the name of a file says that it is a picture.

    Example:
        >>> is_named_as_picture(Path("a.JPG")), is_named_as_picture(Path("a.txt"))
        (True, False)
    """
    return PIL.Image.registered_extensions().get(path.suffix.lower()) in _formats()


def read_header(path: Path) -> Header | None:
    """Reads the size and the kind of a picture; None for a file that is no picture.

    Raises:
        InputError: if it is a picture, and cannot be read.
    """
    try:
        with path.open("rb") as file, _opened(file) as picture:
            return _header(file, picture)
    except PIL.UnidentifiedImageError:
        return None
    except Exception as error:
        raise InputError(_unreadable(path, error)) from error


def walk(root: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder below `root` and itself with its files, all in the order of their names.

    Hidden ones are left out. Links are followed, but to no folder that was seen before.

    Args:
        root: a folder.
        onerror: called with what the system says of a folder that cannot be read.
    """
    seen = set()
    for folder, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        )  # fmt: skip
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _decode(file: BinaryIO, max_pixels: int = 0) -> np.ndarray:
    with _opened(file) as picture:
        if max_pixels and picture.width * picture.height > max_pixels:
            raise ValueError(
                f"it has {picture.height}×{picture.width} pixels, and {max_pixels:,} are allowed"
            )
        if _is_deep(picture):
            return _decode_deep(file, picture)
        mode = _mode(picture)
        upright = PIL.ImageOps.exif_transpose(picture) if _is_turned(picture) else picture
        pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
        if pixels.size and pixels.max() > 65535:
            raise ValueError("it has more than 16 bits a channel")
        dtype = np.uint16 if mode in ("I", "I;16") else np.uint8
        return pixels.astype(dtype, copy=False).reshape(*pixels.shape[:2], CHANNELS[mode])


def _opened(file: BinaryIO) -> PIL.Image.Image:
    return PIL.Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that the installed pillow was built with."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _is_turned(picture: PIL.Image.Image) -> bool:
    return picture.format in PHOTOGRAPHS and picture.getexif().get(ORIENTATION, 1) > 1


def _is_deep(picture: PIL.Image.Image) -> bool:
    """Returns whether pillow may keep 8 bits of 16."""
    colours_of_16_bits = ";16" in str(picture.tile) and picture.mode != "I;16"
    return picture.format in DEEP_FORMATS or colours_of_16_bits


def _decode_deep(file: BinaryIO, picture: PIL.Image.Image) -> np.ndarray:
    import cv2  # which takes a while, and is seldom needed

    file.seek(0)
    found = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        raise ValueError("it is truncated or damaged, or of a kind that OpenCV does not know")
    if found.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"it has values of {found.dtype}, and 8 or 16 bits are read")
    found = found[..., None] if found.ndim == 2 else found
    # OpenCV has blue first, and grey with transparency as four channels.
    grey_and_alpha = ("LA;16" in str(picture.tile)) or picture.mode == "LA"
    order = [0, 3] if grey_and_alpha else [2, 1, 0, 3][: found.shape[-1]]
    return np.ascontiguousarray(found[..., order] if found.shape[-1] > 1 else found)


def _mode(picture: PIL.Image.Image) -> str:
    """Returns what to read the picture as; raises ValueError if it has no such values."""
    if picture.mode == "P":
        return "RGBA" if "transparency" in picture.info else "RGB"
    if picture.mode not in READ_AS:
        raise ValueError(f"it is stored as {picture.mode}: convert it to RGB or grey")
    return READ_AS[picture.mode]


def _header(file: BinaryIO, picture: PIL.Image.Image) -> Header:
    if _is_deep(picture):
        found = _decode_deep(file, picture)
        return Header(*found.shape, found.dtype)
    width, height = picture.size
    if _is_turned(picture) and picture.getexif()[ORIENTATION] in TURNED:
        width, height = height, width
    mode = _mode(picture)
    dtype = np.dtype(np.uint16 if mode in ("I", "I;16") else np.uint8)
    return Header(height, width, CHANNELS[mode], dtype)


def _unreadable(name: str | Path, error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"{name} cannot be read: it is no whole picture of a kind that is known"
    return f"{name} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"
