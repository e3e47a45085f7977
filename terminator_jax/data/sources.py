"""Where pictures come from: one split of a TFDS image data set, opened for random access.

split = open_split("mnist", "train[:5000]")
split.read(np.arange(3))["image"].shape  # (3, 28, 28, 1), read from disk
pictures = split.load()  # the same pictures in memory, with the same `read`
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax.data import digits, folder
from terminator_jax.data.download import download as download_builder
from terminator_jax.data.examples import Batch, LabelledPictures
from terminator_jax.data.pictures import Pictures, load, resized
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
    """

    source: Any
    name: str
    shape: tuple[int, ...]
    num_classes: int
    classes: tuple[str, ...] = ()
    dtype: np.typing.DTypeLike = np.uint8
    resize: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> Batch:
        """Reads the pictures at `indices`, `(n,)`: `image` `(n, *shape)` and `label` `(n,)`.

        This reads from disk and decodes; grain calls it in the thread that prefetches.

        Raises:
            InputError: if a label is out of range, as those of unlabelled splits are.
        """
        examples = self.source.__getitems__([int(i) for i in indices])
        batch = {
            "image": np.stack([resized(example["image"], self.resize) for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }
        low, high = batch["label"].min(), batch["label"].max()
        if low < 0 or high >= self.num_classes:
            raise InputError(
                f"{self.name} has a label {low if low < 0 else high}, and labels must be from 0 to "
                f"{self.num_classes - 1}: choose a split with labels"
            )
        return batch

    def load(self) -> Pictures:
        """Reads every picture into memory."""
        return load(self)


def open_split(
    dataset: str,
    split: str,
    *,
    data_dir: str = "",
    download: bool = False,
    resize: int = 0,
    eval_fraction: float = 0.1,
    split_seed: int = 0,
) -> LabelledPictures:
    """Opens one split of an image data set; reads no picture yet, but those of an `.npz`.

    Args:
        dataset: a name that TFDS knows, with or without version, or `"digits"`, which is bundled,
            or the path of a folder of pictures or of an `.npz`: see `folder`.
        split: `"train"`, `"test[:1000]"` and the like.
        data_dir: where TFDS keeps its data sets; by default `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`. The bundled ones have a place of their own.
        download: lets TFDS download and prepare what is not prepared.
        resize: scales every picture to that many pixels per side; 0 leaves them.
        eval_fraction: the part of own pictures without split that is their split `test`.
        split_seed: decides which pictures these are.

    Raises:
        InputError: if the data set is unknown, not prepared or not of labelled pictures of one
            size, or if it has no such split.

    Example:
        >>> split = open_split("digits", "test")
        >>> len(split), split.shape, split.num_classes
        (360, (8, 8, 1), 10)
    """
    if dataset not in BUNDLED and folder.is_own(dataset):
        return folder.open_own(
            dataset, split, resize=resize, eval_fraction=eval_fraction, split_seed=split_seed
        )
    return _open(open_builder(dataset, data_dir=data_dir, download=download), split, resize)


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


def _open(builder: tfds.core.DatasetBuilder, split: str, resize: int) -> Split:
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
    shape = (resize, resize, image.shape[-1]) if resize else tuple(image.shape)
    if None in shape:
        raise InputError(
            f"the pictures of {builder.name} have different sizes: set --config.data.resize"
        )
    return Split(source, name, shape, label.num_classes, tuple(label.names), dtype, resize)


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
