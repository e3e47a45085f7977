"""Own pictures: a folder of files (`folder`), or an `.npz` of arrays (`arrays`).

pictures/train/cat/1.png, pictures/test/dog/7.jpg   splits and classes are folders
pictures/cat/1.png, pictures/dog/7.jpg              classes are folders; a part becomes `test`
pictures.npz                                        arrays of pictures and labels

split = open_own("pictures", "train", resize=32)
split.classes, split.shape  # ('cat', 'dog'), (32, 32, 3)
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax.classes import listed
from terminator_jax.data.examples import LabelledPictures
from terminator_jax.errors import InputError, warn_once

if TYPE_CHECKING:
    from terminator_jax.data import arrays, folder

# Names that are of splits.
SPLITS = {"train", "test", "val", "valid", "validation", "eval"}

# The positions of each split's pictures among all.
Parts = Mapping[str, np.ndarray]


def is_own(name: str) -> bool:
    """Says whether a data set's name means a path: a folder that TFDS has no set of, or an `.npz`.

    Example:
        >>> is_own("pictures.npz"), is_own("./mnist"), is_own("mnist")
        (True, True, False)
    """
    if name.endswith(".npz") or name.startswith(("/", "./", "../", "~")) or name in (".", ".."):
        return True
    known = tfds.list_builders(with_community_datasets=False)
    return Path(name).is_dir() and Path(name).parts[0] not in known


def open_own(
    name: str,
    split: str,
    *,
    resize: int = 0,
    channels: int = 0,
    eval_fraction: float = 0.1,
    split_seed: int = 0,
    stratify: bool = True,
) -> LabelledPictures:
    """Opens one split of a folder of pictures, or reads one of an `.npz`.

    What was left out, and the classes that only some splits have, are said on stderr.

    Args:
        name: the folder or file.
        split: `"train"`, `"test[:1000]"` and the like. Where the data set has no splits there are
            `train` and `test`.
        resize: scales every picture to that many pixels per side; 0 leaves them.
        channels: of every picture: 1, 3 or 4; -1 for what most have; 0 leaves them.
        eval_fraction: the part of the pictures that is `test`, where there are no splits.
        split_seed: decides which pictures these are, by their names.
        stratify: whether `test` has this part of each class, or of all.

    Raises:
        InputError: if there is no such folder, file or split, or a picture cannot be read.
    """
    path, found = Path(os.path.expanduser(name)), read(name)
    parts = found.parts or held_out(
        found.names, eval_fraction, split_seed, found.label if stratify else None
    )
    for note in (*found.notes, *_missing(path, parts, found.label, found.classes)):
        warn_once(note)
    return found.open(f"{path} {split}", chosen(split, parts, path), resize, channels)


def read(name: str) -> "arrays.Content | folder.Scan":
    """Reads what there is: the arrays of an `.npz`, or the names and headers of a folder's files.

    Raises:
        InputError: as `open_own`.
    """
    from terminator_jax.data import arrays, folder

    path = Path(os.path.expanduser(name))
    return arrays.read(path) if name.endswith(".npz") else folder.scan(path)


def held_out(
    names: Sequence[str], fraction: float, seed: int, label: np.ndarray | None = None
) -> Parts:
    """Returns the positions of `train` and `test`; `test` has the smallest hashes of names.

    So a picture keeps its place when some others come or go. With labels, `test` has its part of
    each class: one picture at least of a class of two or more, and never all of them.

    Example:
        >>> label = np.array([0] * 100 + [1] * 3)
        >>> label[held_out([str(n) for n in range(103)], 0.1, 0, label)["test"]].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    hashes = [hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest() for name in names]
    order = np.array(sorted(range(len(names)), key=hashes.__getitem__), int)
    count = round(len(names) * fraction)
    if label is not None and fraction < 1:
        # The place of each picture among those of its class, from 0 to 1.
        places = np.empty(len(names))
        for group in (order[label[order] == n] for n in np.unique(label)):
            places[group] = (np.arange(len(group)) + 0.5) / len(group)
            places[group[0]], places[group[-1]] = 0, 1
        order = order[np.argsort(places[order], kind="stable")]
        classes = int((places == 1).sum())
        count = min(max(count, int((places == 0).sum())), len(names) - classes)
    return {"train": np.sort(order[count:]), "test": np.sort(order[:count])}


def chosen(split: str, parts: Parts, path: Path) -> np.ndarray:
    """Returns the positions of a split, or of a part of it as TFDS writes them."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(part)], num_bytes=0)
        for name, part in parts.items()
    }
    try:
        slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"{path} has no split {split!r}: it has {', '.join(parts)}, or parts such as "
            f"{next(iter(parts))}[:1000]: set config.data.train_split and config.data.eval_split"
        ) from error
    found = np.concatenate([parts[part.splitname][part.from_ : part.to] for part in slices])
    if len(found) == 0:
        raise InputError(
            f"{path} {split} is empty: choose a larger part, or config.data.eval_fraction"
        )
    return found


def _missing(path: Path, parts: Parts, label: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Returns a line that names the classes of which a split has no picture; none if all do."""
    found = []
    for part, rows in parts.items():
        absent = [name for n, name in enumerate(classes) if n not in set(label[rows].tolist())]
        if absent and len(rows):
            found.append(f"{part} has none of {listed(absent)}")
    return [f"{path}: classes that only some splits have: {'; '.join(found)}"] if found else []
