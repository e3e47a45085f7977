"""The flags, one-line errors and exit codes that the commands share."""

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import io
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import absl.flags
import absl.logging

from terminator_jax.errors import DiskFailure, InputError
from terminator_jax.training import interrupt, paths

if TYPE_CHECKING:
    from terminator_jax.loading import LoadedModel

FAILED = 1
# An environment variable that jaxlib reads when it is imported, and one of its values.
LOG_LEVEL, ONLY_FATAL = "TF_CPP_MIN_LOG_LEVEL", "3"


class Parser(argparse.ArgumentParser):
    """Parses a command's flags; leaves `--config.a.b=c` to the configuration."""

    def __init__(self, description: str, epilog: str = ""):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_run(self, *, positional: bool = False) -> None:
        """Adds the ways to name a run that exists; `run_directory` reads them.

        Args:
            positional: whether the directory may also stand without `--workdir`.
        """
        group = self.add_mutually_exclusive_group(required=True)
        if positional:
            group.add_argument("directory", nargs="?", metavar="RUN_DIR", help="as --workdir")
        group.add_argument("--workdir", help="the directory of the run")
        group.add_argument(
            "--config", metavar="EXPERIMENT", help="its experiment: the run is in runs/EXPERIMENT"
        )

    def add_step(self) -> None:
        """Adds the flag of a checkpoint's step; `checkpoint_step` reads it."""
        self.add_argument("--step", default="best", help="the step of a checkpoint (default: best)")

    def parse_known_args(self, *arguments: Any) -> tuple[argparse.Namespace, list[str]]:
        """Parses as argparse does, which takes `--flag=--` for a flag without a value.

        `--flagfile=FILE` is for the flags in a file, one a line, as in absl.
        """
        words, *more = arguments
        try:
            words = absl.flags.FlagValues().read_flags_from_files(words)
        except (absl.flags.Error, OSError, UnicodeError) as error:
            self.error(f"--flagfile: {error}")
        flags, rest = super().parse_known_args(words, *more)
        for name, value in vars(flags).items():
            if value == []:
                self.error(f"argument --{name}: expected one argument")
        return flags, rest

    def error(self, message: str) -> NoReturn:
        """Raises argparse's own errors as InputError."""
        raise InputError(f"{message}: --help lists the flags")


class _Lossy:
    """A stream that may be lost, as when its terminal closes: what is written then goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes as the stream does."""
        try:
            return self._stream.write(text)
        except OSError:
            _silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flushes as the stream does."""
        try:
            self._stream.flush()
        except OSError:
            _silence(self._stream)


@contextlib.contextmanager
def _streams(*, need_stdout: bool) -> Iterator[None]:
    """Lets no stream end the command, except a lost stdout that it needs."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`: the next file would get its number
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of what it cannot print, it prints codes
            stream.reconfigure(errors="backslashreplace")
    stdout = sys.stdout if need_stdout else _Lossy(sys.stdout)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(_Lossy(sys.stderr)):
        try:
            yield
        finally:
            if not need_stdout:
                stdout.flush()  # what Python could not flush at its end would be exit code 120


def _end_well(_: int, __: Any) -> NoReturn:
    os._exit(0)


def run(
    command: Callable[[Sequence[str]], int], *, extra: str = "", is_service: bool = False
) -> NoReturn:
    """Runs a command with the process's arguments and ends the process with its exit code.

    An `InputError` becomes one line on stderr and exit code 2, a `SystemFailure`, an error of the
    system or a lack of memory exit code 1, Ctrl-C exit code 130. When nobody reads the output any
    more, as after `| head`, the command ends with exit code 1. Anything else is a bug of this
    package, and keeps its traceback.

    Args:
        command: takes the arguments and returns the exit code.
        extra: the extra of this package that installs what the command imports.
        is_service: whether what it prints is not what it is for: then it goes on without a
            terminal, and a signal that asks it to end, other than Ctrl-C, is exit code 0. Such
            a signal needs a handler: process 1 of a container ignores those that have none.
    """
    numbers = [n for n in interrupt.SIGNALS if is_service and n != signal.SIGINT]
    with interrupt.handled(_end_well, *numbers), _streams(need_stdout=not is_service):
        _run(command, extra)


def _run(command: Callable[[Sequence[str]], int], extra: str) -> NoReturn:
    # What TFDS and orbax log as errors is raised too.
    absl.logging.set_verbosity(absl.logging.FATAL)
    _silence_old_jaxlib()
    hide_background_errors()
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _Lossy(sys.stdout).flush()
        # sys.exit would wait until the threads of TFDS have downloaded everything.
        os._exit(interrupt.INTERRUPTED)
    except Exception as error:
        code, line = _explain(error, extra)
        if line:
            print(line, file=sys.stderr)
        if code is None:
            raise
        if isinstance(error, DiskFailure):
            sys.stderr.flush()
            os._exit(code)  # sys.exit would try again to write what is left, and fail in many lines
    sys.exit(code)


def hide_background_errors() -> None:
    """Hides what orbax's coroutines and C++ threads raise: orbax raises the cause of it too."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    previous = sys.unraisablehook
    if getattr(previous, "func", None) is not _print_unless_of_background:  # once is enough
        sys.unraisablehook = functools.partial(_print_unless_of_background, previous)


def _print_unless_of_background(print_it: Callable[[Any], None], unraisable: Any) -> None:
    of_c = unraisable.object is None and unraisable.err_msg is None
    if not of_c and not inspect.iscoroutine(unraisable.object):
        print_it(unraisable)


def _silence_old_jaxlib() -> None:
    """Hides the two lines that jaxlib before 0.10.2 logs for each program from JAX's cache.

    A level that the user has chosen stays; 1 is JAX's own, which its child processes inherit.
    """
    numbers = re.findall(r"\d+", importlib.metadata.version("jaxlib"))
    is_old = tuple(map(int, numbers[:3])) < (0, 10, 2)
    if is_old and os.environ.get(LOG_LEVEL, "1") == "1":
        os.environ[LOG_LEVEL] = ONLY_FATAL


def _explain(error: Exception, extra: str) -> tuple[int | None, str]:
    """Returns the exit code and the line for an error; no code for a bug."""
    match error:
        case InputError():
            return error.exit_code, f"error: {error}"
        case ModuleNotFoundError() if extra:
            package = (error.name or "a package").partition(".")[0]
            hint = f"pip install 'terminator-jax[{extra}]'"
            return FAILED, f"error: {package} is not installed: {hint}"
        case OSError():
            _silence(sys.stdout)  # Python flushes at its end what could not be written
            lost = isinstance(error, BrokenPipeError)
            name = f"{error.filename}: " if error.filename else ""
            return FAILED, "" if lost else f"error: {name}{error.strerror or error}"
    out_of_memory = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
    if isinstance(error, MemoryError) or out_of_memory:
        return FAILED, f"error: not enough memory: {_first_line(error)}"
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ())[-1:])
    return None, f"error: this is a bug; please report it with the lines below{notes}"


def _silence(stream: TextIO) -> None:
    """Sends what is still to be written to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or "allocate less, such as a smaller batch"


def run_directory(flags: argparse.Namespace) -> Path:
    """Returns the directory of the run that `--workdir` or `--config` names.

    Raises:
        InputError: if it cannot be a run's directory.
    """
    directory = flags.workdir if flags.workdir is not None else getattr(flags, "directory", None)
    if directory is None:
        directory = str(paths.default_workdir(flags.config))
    return paths.local_directory(directory)


def checkpoint_step(flags: argparse.Namespace) -> int | None:
    """Returns the step that `--step` names; None for the best.

    Raises:
        InputError: if it is no number.
    """
    if flags.step == "best":
        return None
    if not (flags.step.isascii() and flags.step.isdecimal()):
        raise InputError(f"--step is {flags.step!r}, and must be a step's number or best")
    return int(flags.step)


def load_model(path: str) -> "LoadedModel":
    """Loads the trained model that a command line names, which must be one for pictures.

    What `load_model` warns of is printed on stderr.

    Raises:
        InputError: if there is none.
    """
    from terminator_jax import loading
    from terminator_jax.training import compilation_cache

    try:
        with warnings.catch_warnings(record=True, category=UserWarning) as caught:
            loaded = loading.load_model(os.path.expanduser(path))
        _ = loaded.picture_shape
    except ValueError as error:
        raise InputError(str(error)) from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if loaded.config.get("compilation_cache"):
        compilation_cache.enable()
    return loaded


def same_command(module: str) -> str:
    """Returns the command line that this process was started with.

    Args:
        module: what comes after `python -m`.
    """
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
