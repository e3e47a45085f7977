"""Reads the arrays of an `.npz` file, which nobody need trust."""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from terminator_jax.errors import one_line

# How much more than the file itself its arrays may take in memory: compressed labels and empty
# pictures take little room, and a few bytes can be made to stand for all the memory there is.
FACTOR, ROOM = 20, 2**28


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file by their names.

    Raises:
        ValueError: in one line, if it is no such file, holds Python objects, or would take much
            more memory than its size.

    Example:
        >>> read(Path("nowhere.npz"))
        Traceback (most recent call last):
        ...
        ValueError: nowhere.npz cannot be read as an .npz of arrays: ... No such file ...
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            announced = sum(member.file_size for member in archive.infolist())
            allowed = FACTOR * os.fstat(file.fileno()).st_size + ROOM
            if announced > allowed:
                raise ValueError(f"its arrays take {announced:,} bytes, more than {allowed:,}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays}
            for name, array in found.items():
                if not isinstance(array, np.ndarray):  # but the bytes of something else
                    raise ValueError(f"{name} is no array")
            return found
    # Whatever a damaged file makes NumPy and the standard library raise.
    except (
        OSError, ValueError, EOFError, AttributeError, TypeError, KeyError, IndexError, MemoryError,
        OverflowError, RecursionError, NotImplementedError, RuntimeError, SyntaxError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        problem = one_line(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an .npz of arrays: {problem}") from error
