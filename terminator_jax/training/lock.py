"""Lets one process at a time write to the directory of a run.

    workdir/lock     who writes: the process, the host and since when

The system takes the lock away when the process ends, however it ends. On a file system without
locks there is none.
"""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from terminator_jax.errors import InputError, SystemFailure, cannot_write

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None

FILE_NAME = "lock"


def check_system() -> None:
    """Raises SystemFailure where a run's directory cannot be locked, which is on Windows."""
    if fcntl is None:
        raise SystemFailure(
            "training needs the file locks of Linux or macOS: on Windows, train in WSL; predict, "
            "export and load_model work here too"
        )


@contextlib.contextmanager
def one_writer(workdir: Path) -> Iterator[None]:
    """Holds the lock of a directory, which is created if there is none.

    Raises:
        InputError: if another process holds it, and the message says which; or if the lock cannot
            be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, one_writer(Path(folder)):
        ...     with one_writer(Path(folder)):
        ...         pass
        Traceback (most recent call last):
        ...
        terminator_jax.errors.InputError: process ... trains in ...
    """
    check_system()
    file = workdir / FILE_NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Without O_TRUNC: what is there says who has the lock. A link is not followed.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # others: the file system has no locks
                holder = os.read(descriptor, 1000).decode(errors="replace").strip()
                raise InputError(
                    f"{holder or 'another process'} trains in {workdir}: wait for it, or choose "
                    "another --workdir"
                ) from error
        now = datetime.datetime.now().replace(microsecond=0)
        os.ftruncate(descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {now},"
        os.write(descriptor, holder.encode(errors="replace"))
        yield
    finally:
        os.close(descriptor)
