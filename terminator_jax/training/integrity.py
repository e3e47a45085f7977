"""Checksums of checkpoints: what was damaged on the disk is not trained on.

    workdir/checksums/STEP.json     the SHA-256 of each file of checkpoints/STEP

A checkpoint without checksums is one of an older version, and is read.
"""

import hashlib
import json
from pathlib import Path

from terminator_jax.training.paths import replace_text

FOLDER = "checksums"
DAMAGED = "damaged"


def write(checkpoints: Path, step: int) -> None:
    """Writes the checksums of a checkpoint, and removes those of checkpoints that are gone.

    Args:
        checkpoints: the directory of all checkpoints.
        step: which one.
    """
    folder = checkpoints.parent / FOLDER
    folder.mkdir(exist_ok=True)
    replace_text(_file(checkpoints, step), json.dumps(_digests(checkpoints / str(step)), indent=1))
    for old in folder.glob("*.json"):
        if not (checkpoints / old.stem).is_dir():
            old.unlink(missing_ok=True)


def forget(checkpoints: Path, step: int) -> None:
    """Removes the checksums of a step, which may be those of a checkpoint that is gone."""
    _file(checkpoints, step).unlink(missing_ok=True)


def problem(checkpoints: Path, step: int) -> str:
    """Returns what is wrong with the files of a checkpoint; an empty text for nothing.

    Args:
        checkpoints: the directory of all checkpoints.
        step: which one.
    """
    try:
        expected = dict(json.loads(_file(checkpoints, step).read_text(encoding="utf-8")))
        found = _digests(checkpoints / str(step))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"cannot be checked: {error}"
    missing = sorted(expected.keys() - found.keys())
    changed = sorted(
        name for name in expected.keys() & found.keys() if expected[name] != found[name]
    )
    if missing:
        return f"lacks {missing[0]}"
    return f"has a damaged {changed[0]}" if changed else ""


def set_aside(checkpoints: Path, step: int) -> Path:
    """Moves a damaged checkpoint to `workdir/damaged`, where it is not read; returns its place."""
    folder = checkpoints.parent / DAMAGED
    folder.mkdir(exist_ok=True)
    numbers = range(1, 1000)
    places = (folder / (f"{step}" if n == 1 else f"{step}-{n}") for n in numbers)
    place = next(place for place in places if not place.exists())
    (checkpoints / str(step)).rename(place)
    _file(checkpoints, step).unlink(missing_ok=True)
    return place


def _file(checkpoints: Path, step: int) -> Path:
    return checkpoints.parent / FOLDER / f"{step}.json"


def _digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return digests
