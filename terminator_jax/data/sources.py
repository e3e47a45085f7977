"""Where pictures come from: one split of a TFDS image data set, opened for random access.

split = open_split("mnist", "train[:5000]")
split.read(np.arange(3))["image"].shape  # (3, 28, 28, 1), read from disk
pictures = split.load()  # the same pictures in memory, with the same `read`
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax.data import digits, own
from terminator_jax.data.download import download as download_builder
from terminator_jax.data.examples import Batch, LabelledPictures
from terminator_jax.data.pictures import Pictures, converted, load, resized
from terminator_jax.errors import InputError, one_line

BUNDLED: dict[str, Callable[[], tfds.core.DatasetBuilder]] = {"digits": digits.open_builder}


@dataclasses.dataclass(frozen=True)
class _Source:
    """Wraps TFDS's random access, and says in one line that a file is missing or damaged."""

    examples: Any
    folder: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        try:
            return self.examples.__getitems__(list(indices))
        except Exception as error:  # array_record and pillow raise many kinds
            raise InputError(
                f"{self.folder} cannot be read: {one_line(error)}: remove this folder, so that it "
                "is prepared again"
            ) from error


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared TFDS data set, on disk.

    Attributes:
        source: TFDS's random access to the examples.
        name: data set and split, for messages.
        shape: height, width and channels of a picture, after resizing.
        num_classes: labels are in `[0, num_classes)`.
        classes: the names of the classes.
        dtype: uint8 or uint16.
        resize: side that pictures are scaled to when they are read, 0 for none.
        numbers: the class of each label that is stored.
    """

    source: Any
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    numbers: np.ndarray
    dtype: np.typing.DTypeLike = np.uint8
    resize: int = 0

    checksum: ClassVar[str] = ""  # it has a name and a version

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Labels are in `[0, num_classes)`."""
        return len(self.classes)

    def read(self, indices: np.ndarray) -> Batch:
        """Reads the pictures at `indices`, `(n,)`: `image` `(n, *shape)` and `label` `(n,)`.

        This reads from disk and decodes; grain calls it in the thread that prefetches.

        Raises:
            InputError: if a label is out of range, as those of unlabelled splits are.
        """
        examples = self.source.__getitems__([int(i) for i in indices])
        pictures = [converted(example["image"], self.shape[-1]) for example in examples]
        label = np.array([example["label"] for example in examples], np.int32)
        low, high = label.min(), label.max()
        if low < 0 or high >= len(self.numbers):
            raise InputError(
                f"{self.name} has a label {low if low < 0 else high}, and labels must be from 0 to "
                f"{len(self.numbers) - 1}: choose a split with labels"
            )
        images = [resized(picture, self.resize) for picture in pictures]
        return {"image": np.stack(images), "label": self.numbers[label].astype(np.int32)}

    def load(self) -> Pictures:
        """Reads every picture into memory."""
        return load(self)

    def with_classes(self, numbers: np.ndarray, classes: tuple[str, ...]) -> "Split":
        """Returns the pictures with other classes, of which `numbers` has those of the labels."""
        return dataclasses.replace(self, numbers=numbers[self.numbers], classes=classes)


def open_split(
    dataset: str,
    split: str,
    *,
    data_dir: str = "",
    download: bool = False,
    resize: int = 0,
    channels: int = 0,
    **held_out: Any,
) -> LabelledPictures:
    """Opens one split of an image data set; reads no picture yet, but those of an `.npz`.

    Args:
        dataset: a name that TFDS knows, with or without version, or `"digits"`, which is bundled,
            or the path of a folder of pictures or of an `.npz`: see `own`.
        split: `"train"`, `"test[:1000]"` and the like.
        data_dir: where TFDS keeps its data sets; by default `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`. The bundled ones have a place of their own.
        download: lets TFDS download and prepare what is not prepared.
        resize: scales every picture to that many pixels per side; 0 leaves them.
        channels: of every picture: 1, 3 or 4, which converts others; -1 for what most have; 0
            leaves them.
        held_out: what `own.open_own` takes besides.

    Raises:
        InputError: if the data set is unknown, not prepared or not of labelled pictures of one
            size, or if it has no such split.

    Example:
        >>> split = open_split("digits", "test")
        >>> len(split), split.shape, split.num_classes
        (360, (8, 8, 1), 10)
    """
    if dataset not in BUNDLED and own.is_own(dataset):
        return own.open_own(dataset, split, resize=resize, channels=channels, **held_out)
    builder = open_builder(dataset, data_dir=data_dir, download=download)
    return _open(builder, split, resize, channels)


def open_builder(
    dataset: str,
    *,
    data_dir: str = "",
    download: bool = False,
    bundled: Iterable[str] = BUNDLED,
) -> tfds.core.DatasetBuilder:
    """Returns a data set's builder, downloading it if asked to; arguments as of `open_split`.

    Args:
        dataset: as of `open_split`.
        data_dir: as of `open_split`.
        download: as of `open_split`.
        bundled: names that the error for an unknown one proposes.
    """
    builder = _builder(dataset, data_dir, bundled)
    if not builder.is_prepared():
        if not download:
            raise InputError(_not_prepared(builder))
        download_builder(builder)
        builder = _builder(dataset, data_dir, bundled)
    return builder


def _builder(dataset: str, data_dir: str, bundled: Iterable[str]) -> tfds.core.DatasetBuilder:
    if dataset in BUNDLED:
        return BUNDLED[dataset]()
    try:
        return tfds.builder(dataset, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise InputError(
            f"there is no data set {dataset!r}: take a bundled one ({', '.join(bundled)}), a name "
            "of https://www.tensorflow.org/datasets/catalog/overview or the path of own pictures"
        ) from error
    except Exception as error:  # a version that it does not have, or half of a data set
        raise InputError(f"data set {dataset!r}: {one_line(error)}") from error


def _not_prepared(builder: tfds.core.DatasetBuilder) -> str:
    """Says that the data set is missing and how to get it there."""
    made, root = Path(builder.data_dir).resolve(), Path(builder.data_dir_root).resolve()
    others = [path.name for path in made.parent.glob("*") if (path / "features.json").is_file()]
    found = f" (it holds version {', '.join(sorted(others))} of it)" if others else ""
    return (
        f"{builder.name} is not prepared in {root}{found}: either copy a prepared "
        f"{made.relative_to(root)} there (or set TFDS_DATA_DIR or --config.data.data_dir to where "
        "one is), or let TFDS download it with --config.data.download=True"
    )


def _open(builder: tfds.core.DatasetBuilder, split: str, resize: int, channels: int) -> Split:
    name = f"{builder.name} {split}"
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise InputError(
            f"{builder.name} is no set of labelled pictures: it has {', '.join(features)}, and an "
            "'image' and a class 'label' are needed"
        )
    dtype = np.dtype(image.np_dtype)
    if dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"the pictures of {builder.name} are {dtype}, and must have 8 or 16 bits a channel"
        )
    source = random_access(builder, split)
    size = (resize, resize) if resize else tuple(image.shape[:2])
    shape = (*size, max(channels, 0) or image.shape[-1])
    if None in shape:
        field = "channels" if shape[-1] is None else "resize"
        raise InputError(
            f"the pictures of {builder.name} differ in size or channels: set --config.data.{field}"
        )
    classes, numbers = tuple(label.names), np.arange(label.num_classes)
    return Split(source, name, shape, classes, numbers, dtype, resize)


def random_access(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """TFDS's random access to the examples of a split; raises InputError if it has none."""
    try:
        count = builder.info.splits[split].num_examples
        source = builder.as_data_source(split=split) if count else None
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{builder.name} has no split {split!r}: it has {', '.join(builder.info.splits)}, or "
            f"parts such as {next(iter(builder.info.splits))}[:1000]"
        ) from error
    except NotImplementedError as error:
        raise InputError(
            f"{builder.name} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
            "and only array_record can be read at random places: prepare it again with "
            "file_format='array_record'"
        ) from error
    if count == 0:
        raise InputError(f"{builder.name} {split} is empty: choose a larger part")
    return _Source(source, builder.data_dir)
