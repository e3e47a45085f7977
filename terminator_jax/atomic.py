"""Writes a file whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which takes the place of `path` when it is written.

    The file lies in a folder of its own beside `path`, which nobody else can write to: no link
    can lie in its place.

    Args:
        path: the file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.txt"
        ...     with replacing(file) as partial:
        ...         _ = partial.write_text("all of it")
        ...     file.read_text()
        'all of it'
    """
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
    ) as own:
        partial = Path(own) / path.name
        yield partial
        os.replace(partial, path)
