"""Own pictures: a folder of PNG and JPEG files, or an `.npz` of arrays.

pictures/train/cat/1.png, pictures/test/dog/7.jpg   splits and classes are folders
pictures/cat/1.png, pictures/dog/7.jpg              classes are folders; a part becomes `test`
pictures.npz                                        arrays `image` and `label`, perhaps `classes`

split = open_own("pictures", "train", resize=32)
split.classes, split.shape  # ('cat', 'dog'), (32, 32, 3)

Classes and pictures are in the order of their names. Pictures have 8 or 16 bits a channel and keep
them. What cannot be read without changing its values is refused.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax import npz
from terminator_jax.data.examples import Batch
from terminator_jax.data.files import OTHERS, SUFFIXES, Header, read_header, read_picture
from terminator_jax.data.pictures import Pictures, load, resized
from terminator_jax.errors import InputError

LAYOUT = "CLASS/PICTURE or SPLIT/CLASS/PICTURE, with pictures that end with .png, .jpg or .jpeg"
# Names that are of splits, so that a folder of pictures without classes is not taken for two.
SPLITS = {"train", "test", "val", "valid", "validation", "eval"}

Parts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split of a folder of pictures.

    Attributes:
        files: the pictures.
        label: int32, `(count,)`.
        name: folder and split, for messages.
        classes: the names of the classes.
        shape: height, width and channels of a picture, after resizing.
        dtype: uint8 or uint16.
        resize: side that pictures are scaled to when they are read, 0 for none.
    """

    files: tuple[Path, ...]
    label: np.ndarray
    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    resize: int = 0

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
        images = [resized(read_picture(self.files[i]), self.resize) for i in indices]
        return {"image": np.stack(images), "label": self.label[indices]}

    def load(self) -> Pictures:
        """Reads every picture into memory."""
        return load(self)


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
    name: str, split: str, *, resize: int = 0, eval_fraction: float = 0.1, split_seed: int = 0
) -> Folder | Pictures:
    """Opens one split of a folder of pictures, or reads one of an `.npz`.

    Args:
        name: the folder or file.
        split: `"train"`, `"test[:1000]"` and the like. Without folders for splits there are
            `train` and `test`.
        resize: scales every picture to that many pixels per side; 0 leaves them.
        eval_fraction: the part of the pictures that is `test`, where there are no folders for it.
        split_seed: decides which pictures these are, by their names.

    Raises:
        InputError: if there is no such folder, file or split, or a picture cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if name.endswith(".npz"):
        return _open_npz(path, split, resize, eval_fraction, split_seed)
    return _open_folder(path, split, resize, eval_fraction, split_seed)


def _open_folder(
    root: Path, split: str, resize: int, eval_fraction: float, split_seed: int
) -> Folder:
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: config.data.name is one of {LAYOUT}")
    names = _names(root)
    depths = {len(name.parts) for name in names}
    if not names or not depths <= {2, 3} or len(depths) > 1:
        odd = ", ".join(str(next(n for n in names if len(n.parts) == d)) for d in sorted(depths))
        raise InputError(
            f"{root} has {f'pictures at {odd}' if odd else 'no pictures'}: it must be {LAYOUT}"
        )
    classes = tuple(sorted({name.parts[-2] for name in names}))
    numbers = {name: number for number, name in enumerate(classes)}
    if depths == {3}:
        owner = np.array([name.parts[0] for name in names])
        parts = {part: np.flatnonzero(owner == part) for part in sorted(set(owner.tolist()))}
    elif set(classes) <= SPLITS:
        raise InputError(f"{root} has pictures at {names[0]}, of no class: it must be {LAYOUT}")
    else:
        parts = _held_out([name.as_posix() for name in names], eval_fraction, split_seed)
    chosen = _chosen(split, parts, root)
    files = tuple(root / names[i] for i in chosen)
    label = np.array([numbers[names[i].parts[-2]] for i in chosen], np.int32)
    shape, dtype = _shape(files, resize)
    return Folder(files, label, f"{root} {split}", classes, shape, dtype, resize)


def _names(root: Path) -> list[Path]:
    """Lists the pictures below a folder in the order of their names, relative to it.

    Raises:
        InputError: if there is a picture of a kind that is not read, or a folder cannot be.
    """
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        below = Path(folder).relative_to(root)
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = shown if len(below.parts) < 3 else []
        for file in files:
            suffix = Path(file).suffix.lower()
            if file.startswith(".") or suffix not in SUFFIXES + OTHERS:
                continue
            if suffix in OTHERS:
                raise InputError(
                    f"{root / below / file} is a picture that is not read: convert it to .png"
                )
            found.append(below / file)
    return sorted(found, key=lambda path: path.as_posix())


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _held_out(names: Sequence[str], fraction: float, seed: int) -> Parts:
    """Returns the positions of `train` and `test`; `test` has the smallest hashes of names.

    So a picture keeps its place when some others come or go.
    """
    hashes = [hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest() for name in names]
    order = sorted(range(len(names)), key=hashes.__getitem__)
    count = round(len(names) * fraction)
    return {
        "train": np.array(sorted(order[count:]), int),
        "test": np.array(sorted(order[:count]), int),
    }


def _chosen(split: str, parts: Parts, path: Path) -> np.ndarray:
    """Returns the positions of a split, or of a part of it as TFDS writes them."""
    if split in parts:
        chosen = parts[split]
    else:
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(part)], num_bytes=0)
            for name, part in parts.items()
        }
        try:
            slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InputError(
                f"{path} has no split {split!r}: it has {', '.join(parts)}, or parts such as "
                f"{next(iter(parts))}[:1000]: set config.data.train_split and "
                "config.data.eval_split"
            ) from error
        chosen = np.concatenate([parts[part.splitname][part.from_ : part.to] for part in slices])
    if len(chosen) == 0:
        raise InputError(
            f"{path} {split} is empty: choose a larger part, or config.data.eval_fraction"
        )
    return chosen


def _shape(files: Sequence[Path], resize: int) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of the pictures; raises InputError if they differ."""
    headers = [read_header(path) for path in files]
    first = headers[0]
    for path, header in zip(files, headers, strict=True):
        if header[2:] != first[2:]:
            raise InputError(
                f"{files[0]} has {_kind(first)} and {path} has {_kind(header)}: all must have the "
                "same"
            )
        if not resize and header != first:
            raise InputError(
                f"{files[0]} has {first.height}×{first.width} pixels and {path} has "
                f"{header.height}×{header.width}: set --config.data.resize"
            )
    size = (resize, resize) if resize else first[:2]
    return (*size, first.channels), first.dtype


def _kind(header: Header) -> str:
    return (
        f"{header.channels} channel{'s'[: header.channels > 1]} of {8 * header.dtype.itemsize} bits"
    )


def _open_npz(
    path: Path, split: str, resize: int, eval_fraction: float, split_seed: int
) -> Pictures:
    image, label, classes = _read_npz(path)
    names = [str(i) for i in range(len(image))]
    chosen = _chosen(split, _held_out(names, eval_fraction, split_seed), path)
    image = image[chosen]
    if resize:
        image = np.stack([resized(picture, resize) for picture in image])
    return Pictures(image, label[chosen], f"{path} {split}", len(classes), classes)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures `(n, height, width, channels)`, labels `(n,)` and names of classes."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        found = npz.read(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not {"image", "label"} <= found.keys():
        raise InputError(
            f"{path} must have the arrays 'image' and 'label', and has {', '.join(found)}"
        )
    image, label = _checked_images(path, found["image"]), found["label"]
    if label.shape != image.shape[:1]:
        raise InputError(
            f"{path} must have one label for a picture: 'image' is {image.shape} and 'label' "
            f"{label.shape}"
        )
    return image, *_labelled(path, label, found.get("classes"))


def _checked_images(path: Path, image: np.ndarray) -> np.ndarray:
    if image.dtype.kind != "u" or image.dtype.itemsize > 2:
        raise InputError(f"{path}: 'image' must be uint8 or uint16, and is {image.dtype}")
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise InputError(
            f"{path}: 'image' must be (pictures, height, width, channels), and is {image.shape}"
        )
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    return image if image.ndim == 4 else image[..., None]


def _labelled(
    path: Path, label: np.ndarray, classes: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers and the names of the classes, which the labels may be themselves."""
    if label.dtype.kind == "U" and classes is None:
        names, label = np.unique(label, return_inverse=True)
        return label.astype(np.int32), tuple(map(str, names))
    if label.dtype.kind not in "iu":
        raise InputError(f"{path}: 'label' must be whole numbers from 0 on, and is {label.dtype}")
    count = int(label.max()) + 1 if classes is None else len(classes)
    if label.min() < 0 or label.max() >= count:
        raise InputError(
            f"{path} has labels from {label.min()} to {label.max()}, and they must be from 0 to "
            f"{count - 1}"
        )
    names = range(count) if classes is None else classes
    return label.astype(np.int32), tuple(map(str, names))
