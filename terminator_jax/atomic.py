"""Writes a file whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """Gives the name of a file to write, which takes the place of `path` when it is written.

    Args:
        path: the file.
        suffix: what the name ends with, for a writer that goes by that, such as `np.savez`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.txt"
        ...     with replacing(file) as partial:
        ...         _ = partial.write_text("all of it")
        ...     file.read_text()
        'all of it'
    """
    partial = path.with_name(f".{path.name}.partial{suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
