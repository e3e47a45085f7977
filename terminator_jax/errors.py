"""The errors that the commands print in one line, without a traceback."""

import errno
import functools
import sys

# What the system says when there is no more room.
FULL = (errno.ENOSPC, errno.EDQUOT)
# What it says of a disk that fails, and of one that it lets nobody write to any more.
FAILED = (errno.EIO, errno.EROFS)


class InputError(ValueError):
    """Says in one line what cannot be done, and what to do instead; exit code 2."""

    exit_code = 2


class SystemFailure(InputError):
    """Says in one line what the machine refused: disk, memory, network, another process.

    The same command may succeed later or elsewhere; exit code 1.
    """

    exit_code = 1


class DiskFailure(SystemFailure):
    """Says in one line which disk is full, fails or can only be read; exit code 1."""


def one_line(error: object) -> str:
    """Returns the message of an error in one line.

    Example:
        >>> one_line(ValueError("a\\n  b"))
        'a b'
    """
    return " ".join(str(error).split())


def is_full(error: BaseException) -> bool:
    """Returns whether a disk was full, also if a library says so in an error of its own."""
    text = f"{error} {error.__cause__}"
    return getattr(error, "errno", None) in FULL or "No space left" in text


def cannot_write(path: object, error: OSError, hint: str = "choose another place") -> InputError:
    """Returns the error to raise for a path that the system does not let us write.

    Args:
        path: what a message calls it.
        error: what the system answered.
        hint: what to do instead.

    Example:
        >>> print(cannot_write("runs/a", OSError(errno.ENOSPC, "No space left on device")))
        runs/a cannot be written: the disk is full: make room, or choose another place
    """
    if error.errno in FULL:
        return DiskFailure(f"{path} cannot be written: the disk is full: make room, or {hint}")
    kind = DiskFailure if error.errno in FAILED else InputError
    return kind(f"{path} cannot be written: {error.strerror or error}: {hint}")


@functools.cache
def warn_once(line: str) -> None:
    """Prints a warning on stderr, each once in a process."""
    print(f"warning: {line}", file=sys.stderr)
