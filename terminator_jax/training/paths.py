"""Finds an experiment's file by its name and a run's directory, and writes files into it.

--config=experiments/cifar10.py    a file, or one of those that come with the package
--config=cifar10                   the same by its bare name, from any folder
--workdir                          by default runs/cifar10
"""

import difflib
import os
import re
from pathlib import Path

import terminator_jax
from terminator_jax.atomic import replacing
from terminator_jax.errors import InputError

PACKAGE = Path(terminator_jax.__file__).parent
# An installed package brings its experiments along; in a source tree they lie beside it.
EXPERIMENTS = next(
    (folder for folder in (PACKAGE / "experiments", PACKAGE.parent / "experiments")
     if folder.is_dir()),
    PACKAGE / "experiments",
)  # fmt: skip
# orbax looks for parts of a checkpoint with patterns, in which these have a meaning of their own.
PATTERN_CHARACTERS = "[]*?"


def experiments() -> list[str]:
    """Returns the names of the experiments that come with the package."""
    return sorted(file.stem for file in EXPERIMENTS.glob("*.py"))


def experiment_file(name: str | Path) -> Path:
    """Returns the file of an experiment.

    Args:
        name: a file; or the bare name, or `experiments/NAME.py`, of one that comes with the
            package.

    Raises:
        InputError: if there is no such file.

    Example:
        >>> experiment_file("cifar10").name
        'cifar10.py'
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.parent in (Path(), Path("experiments")) and path.suffix in ("", ".py"):
        bundled = EXPERIMENTS / f"{path.stem}.py"
        if bundled.is_file():
            return bundled
    known = experiments()
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"experiments are {', '.join(known)}"
    raise InputError(f"there is no configuration file or experiment {str(name)!r}: {hint}")


def split_argument(experiment: str | Path) -> tuple[str, list[str]]:
    """Returns the file or the name of an experiment, and the argument for its `get_config`, if any.

    Example:
        >>> split_argument("mine.py:small"), split_argument("digits")
        (('mine.py', ['small']), ('digits', []))
    """
    name, colon, argument = str(experiment).rpartition(":")
    if not colon or Path(experiment).is_file() or Path(name).suffix not in ("", ".py"):
        return str(experiment), []
    return name, [argument]


def default_workdir(experiment: str | Path) -> Path:
    """Returns where a run of an experiment writes unless told otherwise: `runs/NAME`.

    Example:
        >>> print(default_workdir("experiments/cifar10.py"), default_workdir("mine.py:small"))
        runs/cifar10 runs/mine-small
    """
    name, argument = split_argument(experiment)
    return Path("runs") / "-".join([Path(name).stem, *(re.sub(r"\W+", "-", a) for a in argument)])


def local_directory(name: str) -> Path:
    """Returns the path of a run's directory; looks at nothing on the disk.

    Args:
        name: a path, in which a leading `~` is the user's home.

    Raises:
        InputError: if checkpoints could not be written to such a path and read again.

    Example:
        >>> local_directory("gs://bucket/run")
        Traceback (most recent call last):
        ...
        terminator_jax.errors.InputError: --workdir is 'gs://bucket/run', and must be ...
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise InputError(
            f"--workdir is {name!r}, and must be a directory of this machine: train to a local "
            "disk, and copy it from there"
        )
    if not name or "\0" in name:
        raise InputError(f"--workdir is {name!r}, and must be a directory's name")
    path = Path(os.path.expanduser(name))
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:  # orbax writes to no such path
        raise InputError(
            f"--workdir is {str(path.absolute())!a}, no text in this locale: set PYTHONUTF8=1"
        ) from error
    found = [character for character in PATTERN_CHARACTERS if character in str(path.absolute())]
    if found:
        raise InputError(
            f"--workdir is {str(path.absolute())!r}, and must not contain {' '.join(found)}: "
            "checkpoints under such a name cannot be read again"
        )
    return path


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in UTF-8; names of files in it are the system's bytes."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
