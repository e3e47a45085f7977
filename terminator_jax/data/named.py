"""Reads the pictures that a command line names.

They are in files, in folders, in arrays, or come by standard input.
"""

import codecs
import glob
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from terminator_jax.data.files import (
    decode_picture,
    is_named_as_picture,
    is_picture,
    read_picture,
    walk,
)
from terminator_jax.errors import InputError, one_line

Named = tuple[str, np.ndarray]

ARRAY = ".npy"
STDIN = "-"
# What an array's file begins with.
ARRAYS = b"\x93NUMPY"
ARRAY_SHAPES = "(height, width, channels) or (pictures, height, width, channels)"


def read_named(
    paths: Sequence[str],
    stdin: BinaryIO,
    *,
    channels: int,
    report: Callable[[str], None],
    others: list[str],
) -> Iterator[Named]:
    """Reads pictures one after the other; what cannot be read is reported and left out.

    Args:
        paths: pictures, `.npy` files, folders, which are read with all that is below them, patterns
            such as `"*.png"`, or `-` for standard input: the bytes of a picture or of an `.npy`, or
            else such paths, one a line.
        stdin: standard input.
        channels: of a picture. An `.npy` of three axes holds grey pictures if this is 1 and its
            last axis is longer than 4, and otherwise one picture.
        report: called with a line on each thing that cannot be read.
        others: files in folders that are no pictures by their names are added to it.

    Yields:
        The name and the picture, uint8 or uint16 `(height, width, channels)`.
    """
    for path in paths:
        try:
            if path == STDIN:
                yield from _read_stdin(stdin, channels, report, others)
            else:
                yield from _read_path(path, channels, report, others)
        except InputError as error:
            report(str(error))


def _read_stdin(stdin: BinaryIO, channels: int, report: Callable, others: list) -> Iterator[Named]:
    data = stdin.read()
    if data.startswith(ARRAYS):
        yield from _rows(STDIN, lambda: np.lib.format.read_array(io.BytesIO(data)), channels)
    elif is_picture(io.BytesIO(data)):
        yield STDIN, decode_picture(data, "standard input")
    else:
        for name in _listed(data):
            try:
                yield from _read_path(name, channels, report, others)
            except InputError as error:
                report(str(error))


def _listed(data: bytes) -> list[str]:
    """Returns the names in a list of files, one a line, or each with a zero byte after it."""
    end = b"\0" if data.endswith(b"\0") else b"\n"
    lines = data.removeprefix(codecs.BOM_UTF8).split(end)
    names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines]
    names = [name for name in names if name]
    is_binary = any("\0" in name for name in names)
    # Names may be of other bytes than UTF-8, which other contents than names have too.
    if not names or is_binary or not (_is_utf8(data) or any(map(os.path.lexists, names))):
        raise InputError("standard input is no picture, no .npy and no list of files")
    return names


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_path(name: str, channels: int, report: Callable, others: list) -> Iterator[Named]:
    for path in _files(name, report, others):
        try:
            if path.suffix.lower() == ARRAY:
                yield from _rows(path, lambda p=path: np.lib.format.open_memmap(p, "r"), channels)
            else:
                yield str(path), read_picture(path)
        except InputError as error:
            report(str(error))


def _files(name: str, report: Callable, others: list) -> Iterator[Path]:
    """Returns the files that a path means."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        found = list(_below(path, report, others))
        if not found:
            raise InputError(f"{path} holds no pictures")
        yield from found
    elif os.path.lexists(path) or not glob.has_magic(name):
        yield path
    else:
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise InputError(f"no file is named like {name}")
        files, walked = [], set()
        for match in map(Path, found):
            if not walked.isdisjoint(match.parents):
                continue  # `**` names a folder, and then all that is in it
            if match.is_dir():
                walked.add(match)
                files.extend(_below(match, report, others))
            else:
                files.append(match)
        if not files:
            raise InputError(f"what is named like {name} holds no pictures")
        yield from files


def _below(root: Path, report: Callable, others: list) -> Iterator[Path]:
    """Lists the pictures and arrays below a folder, each folder in the order of its names."""
    refuse = lambda error: report(f"{error.filename} cannot be read: {error.strerror}")  # noqa: E731
    for folder, files in walk(root, refuse):
        for path in (folder / file for file in files):
            if path.suffix.lower() == ARRAY or is_named_as_picture(path) or _is_picture(path):
                yield path
            else:
                others.append(str(path))


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_picture(file)
    except OSError:
        return True  # what is wrong is said when it is read


def _rows(name: str | Path, load: Callable[[], np.ndarray], channels: int) -> Iterator[Named]:
    """Gives the pictures of an array one by one."""
    try:
        array = load()
    except Exception as error:  # NumPy raises many kinds for a file that is not whole
        raise InputError(f"{name} cannot be read as an array: {one_line(error)}") from error
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise InputError(f"{name} must hold uint8 or uint16, and holds {array.dtype}")
    several = array.ndim == 3 and channels == 1 and array.shape[-1] > 4
    single = array.ndim in (2, 3) and not several
    batch = array[None] if single else array
    if array.ndim in (2, 3) and batch.ndim == 3:
        batch = batch[..., None]
    if batch.ndim != 4 or 0 in batch.shape:
        raise InputError(f"{name} must hold {ARRAY_SHAPES}, and holds {array.shape}")
    for index, picture in enumerate(batch):
        image = picture.astype(picture.dtype.newbyteorder("="))
        yield (str(name) if single else f"{name}[{index}]"), np.asarray(image)
