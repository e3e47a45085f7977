"""The data that a run was trained on: WORKDIR/data.json.

Own pictures are the same wherever they lie, if their classes, their number and their content are.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import safetensors
from ml_collections import ConfigDict

from terminator_jax import loading
from terminator_jax.data import own
from terminator_jax.data.examples import Examples
from terminator_jax.errors import InputError, one_line, warn_once
from terminator_jax.training.paths import replace_text

FILE_NAME = "data.json"


class Provenance(NamedTuple):
    """What is known of the training data.

    Attributes:
        classes: their names, in the order of the model's logits.
        checksum: of own pictures; "" for a data set that has a name of its own.
        count: the number of training examples; 0 for a run of an older version, -1 if it is lost.
        path: where own pictures lay.
    """

    classes: tuple[str, ...] = ()
    checksum: str = ""
    count: int = 0
    path: str = ""


def read(workdir: Path) -> Provenance | None:
    """Reads what is known of a run's data; None if nothing is.

    A run of an older version has no such file. Its model names the classes.
    """
    count = 0
    try:
        found = json.loads((workdir / FILE_NAME).read_text("utf-8"))
        return Provenance(**found)._replace(classes=tuple(found["classes"]))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        warn_once(f"{workdir / FILE_NAME} cannot be read: {one_line(error)}")
        count = -1
    try:
        with safetensors.safe_open(workdir / loading.FILE_NAME, "np") as model:
            return Provenance(tuple(json.loads(model.metadata()["classes"])), count=count)
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError):
        return Provenance(count=count) if count else None


def write(workdir: Path, config: ConfigDict, train: Examples, known: Provenance | None) -> None:
    """Writes what a run is trained on; `known` is what was read before, None for a new run."""
    if known and not known.count:
        return  # a run of an older version stays one
    path = str(Path(config.data.name).expanduser().absolute()) if train.checksum else ""
    found = Provenance(train.classes, train.checksum, len(train), path)
    if found != known:
        text = json.dumps(found._asdict(), indent=1, ensure_ascii=False)
        replace_text(workdir / FILE_NAME, text + "\n")


def as_trained(config: ConfigDict, saved: ConfigDict, known: Provenance | None) -> ConfigDict:
    """Returns the configuration with which the data of a run are opened as they were for it.

    Own pictures are looked for where they lay, if they are not where `config` says. An older
    version held a part of all pictures out, not of each class.
    """
    config = config.copy_and_resolve_references()
    if known is None or not known.count:
        config.data.stratify = False
    elif known.path and config.data.name == saved.data.name and Path(known.path).exists():
        here = Path(config.data.name).expanduser().exists()
        config.data.name = config.data.name if here else known.path
    return config


def is_same(saved: ConfigDict, config: ConfigDict, known: Provenance | None) -> bool:
    """Returns whether `config.data.name` means the data that a run was trained on."""
    before, now = saved.data.name, config.data.name
    if before == now or not own.is_own(now):
        return before == now
    places = [os.path.realpath(os.path.expanduser(name)) for name in (before, now)]
    if places[0] == places[1]:
        return True
    return bool(known and known.checksum) and own.read(now).checksum == known.checksum


def check(config: ConfigDict, train: Examples, known: Provenance | None) -> None:
    """Compares the training data of a run that goes on with those of before.

    Raises:
        InputError: if they are others.
    """
    if known is None or config.data.match_classes == "number":
        return
    if known.checksum == train.checksum:
        return
    if known.count > 0 and known.count != len(train):
        raise InputError(
            f"{train.name} has {len(train)} pictures, and had {known.count} when the run began: "
            "begin another run with --config.init_from and another --workdir"
        )
    warn_once(f"{train.name}: its pictures are not all as they were when the run began")
