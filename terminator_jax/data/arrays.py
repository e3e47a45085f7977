"""Pictures and labels in an `.npz`, under the names that Keras, MedMNIST and scikit-learn use.

image, label                                 and others of `PICTURES` and `LABELS`
x_train, y_train, x_test, y_test             with the name of a split before or after
classes                                      names; without them labels are their own names
"""

import dataclasses
import hashlib
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from terminator_jax import npz
from terminator_jax.classes import listed
from terminator_jax.data.own import SPLITS, Parts
from terminator_jax.data.pictures import Pictures, converted, resized
from terminator_jax.errors import InputError

PICTURES = ("image", "images", "x", "data")
LABELS = ("label", "labels", "y", "target", "targets")
CLASSES = ("classes", "class_names", "target_names", "label_names")

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Content:
    """What an `.npz` holds.

    Attributes:
        image: uint8 or uint16, `(count, height, width, channels)`.
        label: int32, `(count,)`.
        classes: the names of the classes.
        parts: the splits, if the file has any.
        notes: lines on what is odd.
        checksum: of the arrays.
    """

    image: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    parts: Parts
    notes: tuple[str, ...]
    checksum: str

    @property
    def names(self) -> list[str]:
        """The names of the pictures, by which some are held out."""
        return [str(number) for number in range(len(self.label))]

    def open(self, name: str, rows: np.ndarray, resize: int, channels: int) -> Pictures:
        """Returns some of the pictures."""
        image = self.image[rows]
        if channels > 0 or resize:
            try:
                image = np.stack([
                    resized(converted(picture, max(channels, 0) or image.shape[-1]), resize)
                    for picture in image
                ])  # fmt: skip
            except ValueError as error:
                raise InputError(f"{name}: config.data.channels: {error}") from error
        return Pictures(
            image, self.label[rows], name, len(self.classes), self.classes, self.checksum
        )


def read(path: Path) -> Content:
    """Reads an `.npz`.

    Raises:
        InputError: if there is no such file, or it holds no pictures with labels.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        found = npz.read(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    pairs = _pairs(path, found)
    images, labels = [], []
    for image_name, label_name in pairs.values():
        images.append(_pictures(path, image_name, found[image_name]))
        labels.append(_labels(path, label_name, found[label_name]))
        if len(labels[-1]) != len(images[-1]):
            raise InputError(
                f"{path} must have one label for a picture: {image_name!r} is "
                f"{found[image_name].shape} and {label_name!r} {found[label_name].shape}"
            )
    kinds = {(image.shape[1:], str(image.dtype)) for image in images}
    if len({label.dtype.kind for label in labels}) > 1 or len(kinds) > 1:
        raise InputError(f"{path}: its splits must be alike: {_shapes(pairs, found)}")
    label = np.concatenate(labels)
    names = next((found[name] for name in CLASSES if name in found), None)
    label, classes, notes = _classes(path, label, names)
    starts = np.cumsum([0, *map(len, labels)])
    parts = {part: np.arange(a, b) for part, a, b in zip(pairs, starts, starts[1:], strict=False)}
    with zipfile.ZipFile(path) as archive:
        members = sorted((m.filename, m.file_size, m.CRC) for m in archive.infolist())
    return Content(
        np.concatenate(images), label, classes, {} if "" in parts else parts, notes,
        hashlib.sha256(repr(members).encode()).hexdigest()[:16],
    )  # fmt: skip


def _pairs(path: Path, found: Arrays) -> dict[str, tuple[str, str]]:
    """Returns the names of pictures and labels by the split; by "" where there are no splits."""
    pairs: dict[str, dict[str, str]] = {}
    for role, names in (("image", PICTURES), ("label", LABELS)):
        for wanted in reversed(names):  # of several, the first in the list
            for name in found:
                words = name.lower().replace("-", "_").split("_")
                splits = [word for word in words if word in SPLITS]
                if [word for word in words if word not in SPLITS] == [wanted] and len(splits) < 2:
                    pairs.setdefault("".join(splits), {})[role] = name
    whole = {split: (p["image"], p["label"]) for split, p in pairs.items() if len(p) == 2}
    if not whole:
        raise InputError(
            f"{path} must have the arrays 'image' and 'label', or x_train and y_train and so on, "
            f"and has {', '.join(found)}"
        )
    return {"": whole[""]} if "" in whole else whole


def _shapes(pairs: Mapping[str, tuple[str, str]], found: Arrays) -> str:
    names = [name for pair in pairs.values() for name in pair]
    return ", ".join(f"{name} is {found[name].dtype} {found[name].shape}" for name in names)


def _pictures(path: Path, name: str, image: np.ndarray) -> np.ndarray:
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise InputError(
            f"{path}: {name!r} must be (pictures, height, width, channels), and is {image.shape}"
        )
    if image.dtype.kind == "i" and image.min() >= 0 and image.max() <= 65535:
        image = image.astype(np.uint8 if image.max() <= 255 else np.uint16)
    if image.dtype.kind != "u" or image.dtype.itemsize > 2:
        raise InputError(
            f"{path}: {name!r} must be uint8 or uint16, and is {image.dtype}: for values from 0 to "
            "1 save np.rint(255 * image).astype(np.uint8)"
        )
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    return image if image.ndim == 4 else image[..., None]


def _labels(path: Path, name: str, label: np.ndarray) -> np.ndarray:
    """Returns whole numbers or texts, `(count,)`, from a column or from one-hot rows too."""
    if label.dtype.kind == "S":
        label = np.char.decode(label, "utf-8")
    if label.dtype.kind in "bf" and np.array_equal(label, np.rint(label)):
        label = label.astype(np.int64)
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    elif label.ndim == 2 and label.dtype.kind in "iu":
        if not (np.isin(label, (0, 1)).all() and (label.sum(1) == 1).all()):
            raise InputError(f"{path}: {name!r} is {label.shape}, and its rows are not one-hot")
        label = label.argmax(1)
    if label.ndim != 1 or label.dtype.kind not in "iuU":
        raise InputError(
            f"{path}: {name!r} must be whole numbers from 0 on, names or one-hot, and is "
            f"{label.dtype} {label.shape}"
        )
    return label


def _classes(
    path: Path, label: np.ndarray, names: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Returns labels as the numbers of classes, the names of these, and notes."""
    is_text, notes = label.dtype.kind == "U", ()
    if not is_text and label.min() < 0:
        raise InputError(
            f"{path} has labels from {label.min()} to {label.max()}, and they must be from 0 on"
        )
    if names is None:
        present, label = np.unique(label, return_inverse=True)
        classes = _composed(present)
        gaps = [] if is_text else sorted({*range(int(present[-1]))} - {*present.tolist()})
        if gaps and gaps != [0]:
            gap = listed([str(n) for n in gaps])
            notes = (f"{path}: no picture has the label {gap}: it is no class",)
    else:
        classes = _composed(names.astype(str))
        if is_text:
            known = {name: number for number, name in enumerate(classes)}
            texts = _composed(label)
            others = sorted({*texts} - {*known})
            if others:
                raise InputError(f"{path} has the labels {listed(others)}, not in its 'classes'")
            label = np.array([known[text] for text in texts])
        elif label.max() >= len(classes):
            raise InputError(
                f"{path} has labels from {label.min()} to {label.max()}, and they must be from 0 "
                f"to {len(classes) - 1}, as it has names for"
            )
    if len(set(classes)) < len(classes):
        raise InputError(f"{path} has two classes of one name: {listed(sorted(classes))}")
    return label.astype(np.int32), classes, notes


def _composed(names: np.ndarray) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names.tolist())
