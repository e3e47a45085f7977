"""The flags, one-line errors and exit codes that the commands share."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import logging

from terminator_jax.errors import InputError
from terminator_jax.training import paths

USER_ERROR = 2
INTERRUPTED = 130


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

    def error(self, message: str) -> NoReturn:
        """Raises argparse's own errors as InputError."""
        raise InputError(f"{message}: --help lists the flags")


def run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a command with the process's arguments and ends the process with its exit code.

    An `InputError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    logging.set_verbosity(logging.ERROR)  # TFDS and orbax log much
    try:
        code = command(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # sys.exit would wait until TFDS's threads have downloaded everything
    sys.exit(code)


def run_directory(flags: argparse.Namespace) -> Path:
    """Returns the directory of the run that `--workdir` or `--config` names.

    Raises:
        InputError: if it cannot be a run's directory.
    """
    directory = flags.workdir if flags.workdir is not None else getattr(flags, "directory", None)
    if directory is None:
        directory = str(paths.default_workdir(flags.config))
    return paths.local_directory(directory)


def same_command(module: str) -> str:
    """Returns the command line that this process was started with.

    Args:
        module: what comes after `python -m`.
    """
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
