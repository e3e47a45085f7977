"""A folder of pictures: `CLASS/PICTURE`, or `SPLIT/CLASS/PICTURE`.

Pictures are in the order of their names, and classes too: 2 comes before 10. Names are compared as
people read them: é is the same letter whether it is stored as one character or as two, as archives
of a Mac have it.
"""

import collections
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from terminator_jax.classes import listed
from terminator_jax.data.examples import Batch
from terminator_jax.data.files import Header, read_header, read_picture, walk
from terminator_jax.data.own import SPLITS, Parts
from terminator_jax.data.pictures import Pictures, converted, load, resized
from terminator_jax.errors import InputError

LAYOUT = "CLASS/PICTURE or SPLIT/CLASS/PICTURE"


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split of a folder of pictures.

    Attributes:
        files: the pictures.
        label: int32, `(count,)`.
        name: folder and split, for messages.
        classes: the names of the classes.
        shape: height, width and channels of a picture, after resizing and conversion.
        dtype: uint8 or uint16.
        resize: side that pictures are scaled to when they are read, 0 for none.
        checksum: of the names and sizes of all pictures in the folder.
    """

    files: tuple[Path, ...]
    label: np.ndarray
    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    resize: int = 0
    checksum: str = ""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """Labels are in `[0, num_classes)`."""
        return len(self.classes)

    def read(self, indices: np.ndarray) -> Batch:
        """Reads the pictures at `indices`, `(n,)`: `image` `(n, *shape)` and `label` `(n,)`.

        Raises:
            InputError: if a file cannot be read.
        """
        pictures = [converted(read_picture(self.files[i]), self.shape[-1]) for i in indices]
        images = [resized(picture, self.resize) for picture in pictures]
        return {"image": np.stack(images), "label": self.label[indices]}

    def load(self) -> Pictures:
        """Reads every picture into memory."""
        return load(self)

    def with_classes(self, numbers: np.ndarray, classes: tuple[str, ...]) -> "Folder":
        """Returns the pictures with other classes, of which `numbers` has those of the labels."""
        label = numbers[self.label].astype(np.int32)
        return dataclasses.replace(self, label=label, classes=classes)


@dataclasses.dataclass(frozen=True)
class Scan:
    """What is in a folder of pictures.

    Attributes:
        root: the folder.
        paths: the pictures, relative to it.
        headers: what they are.
        label: the number of each picture's class, int32.
        classes: the names of the classes.
        parts: the splits, if the folder has folders for them.
        notes: lines on what was left out.
    """

    root: Path
    paths: tuple[Path, ...]
    headers: tuple[Header, ...]
    label: np.ndarray
    classes: tuple[str, ...]
    parts: Parts
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names of the pictures, by which some are held out."""
        return [path.as_posix() for path in self.paths]

    def open(self, name: str, rows: np.ndarray, resize: int, channels: int) -> Folder:
        """Opens some of the pictures; raises InputError if they are not alike."""
        if channels < 0:
            counts = collections.Counter(header.channels for header in self.headers)
            channels = counts.most_common(1)[0][0]
        paths, headers = [self.paths[i] for i in rows], [self.headers[i] for i in rows]
        shape, dtype = _shape(self.root, paths, headers, resize, channels)
        files = tuple(self.root / path for path in paths)
        return Folder(
            files, self.label[rows], name, self.classes, shape, dtype, resize, self.checksum
        )

    @property
    def checksum(self) -> str:
        """A checksum of the names and sizes of all pictures."""
        sizes = [f"{_composed(p)} {(self.root / p).stat().st_size}" for p in self.paths]
        text = "\n".join(sizes).encode(errors="surrogateescape")
        return hashlib.sha256(text).hexdigest()[:16]


def scan(root: Path) -> Scan:
    """Finds the pictures in a folder, by what the files hold.

    Raises:
        InputError: if there is no such folder, it has another layout, or cannot be read.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: config.data.name is one of {LAYOUT}")
    found, others, folders = [], [], []
    for folder, files in walk(root, _refuse):
        folders.append(folder.relative_to(root))
        for file in files:
            header = read_header(folder / file)
            path = (folder / file).relative_to(root)
            others.append(path) if header is None else found.append((path, header))
    found.sort(key=lambda pair: pair[0].as_posix())
    paths = tuple(path for path, _ in found)
    depths = {len(path.parts) for path in paths}
    left_out = _left_out(root, others)
    if not paths or not depths <= {2, 3} or len(depths) > 1:
        odd = ", ".join(str(next(p for p in paths if len(p.parts) == d)) for d in sorted(depths))
        has = f"pictures at {odd}" if odd else f"no pictures{''.join(f' ({n})' for n in left_out)}"
        raise InputError(f"{root} has {has}: it must be {LAYOUT}")
    [depth] = depths
    of = [_composed(path.parts[-2]) for path in paths]
    numbered = all(name.isdecimal() for name in of)
    classes = tuple(sorted(set(of), key=(lambda name: (int(name), name)) if numbered else None))
    if depth == 2 and set(classes) <= SPLITS:
        raise InputError(f"{root} has pictures at {paths[0]}, of no class: it must be {LAYOUT}")
    numbers = {name: number for number, name in enumerate(classes)}
    owner = np.array([path.parts[0] for path in paths])
    parts = {p: np.flatnonzero(owner == p) for p in sorted(set(owner.tolist()))}
    emptied = {_composed(f.name) for f in folders if len(f.parts) == depth - 1} - set(classes)
    notes = left_out + [f"{root} has no pictures of {listed(sorted(emptied))}"] * bool(emptied)
    return Scan(
        root, paths, tuple(header for _, header in found),
        np.array([numbers[name] for name in of], np.int32), classes,
        parts if depth == 3 else {}, tuple(notes),
    )  # fmt: skip


def _composed(name: str | Path) -> str:
    return unicodedata.normalize("NFC", name.as_posix() if isinstance(name, Path) else name)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _left_out(root: Path, others: Sequence[Path]) -> list[str]:
    """Returns a line that counts files that are no pictures by their suffixes; none for none."""
    counts = collections.Counter(path.suffix.lower() or "no suffix" for path in others)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    first = min(others, key=Path.as_posix, default=None)
    line = f"{root}: {kinds} cannot be read as pictures and are left out, such as {first}"
    return [line] if others else []


def _shape(
    root: Path, paths: Sequence[Path], headers: Sequence[Header], resize: int, channels: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of the pictures; raises InputError if they differ."""
    kinds = [(channels or header.channels, header.dtype) for header in headers]
    [((most, dtype), _), *different] = collections.Counter(kinds).most_common()
    if different:
        hint = "save them with as many bits"
        if all(kind[1] == dtype for kind, _ in different):
            hint = f"set --config.data.channels={3 if most == 2 else most}, which converts them"
        raise InputError(f"{root} has pictures {_counted(paths, map(_kind, kinds))}: {hint}")
    sizes = [f"{header.height}×{header.width} pixels" for header in headers]
    if not resize and len(set(sizes)) > 1:
        raise InputError(f"{root} has pictures {_counted(paths, sizes)}: set --config.data.resize")
    size = (resize, resize) if resize else headers[0][:2]
    return (*size, most), dtype


def _kind(kind: tuple[int, np.dtype]) -> str:
    channels, dtype = kind
    return f"{channels} channel{'s'[: channels > 1]} of {8 * dtype.itemsize} bits"


def _counted(paths: Sequence[Path], kinds: Iterable[str]) -> str:
    """Returns how many pictures are of each kind, and the first of all but the most common."""
    kinds = list(kinds)
    counts = collections.Counter(kinds).most_common()
    examples = [f", such as {paths[kinds.index(kind)]}" for kind, _ in counts]
    examples[0] = ""
    shown = [f"of {k} ({n}{e})" for (k, n), e in zip(counts, examples, strict=True)]
    return listed(shown)
