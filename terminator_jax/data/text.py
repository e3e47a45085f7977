"""Reads texts as grids of bytes: one split of a TFDS text data set, or of the bundled sonnets.

text = open_text("sonnets", "train", (16, 16))
text.read(np.arange(3))["tokens"].shape  # (3, 16, 16)

The bytes fill a grid row after row. For evaluation, the text is split into grids without overlap.
For training, a grid may start at any byte.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import grain
import numpy as np

from terminator_jax.data import sources
from terminator_jax.data.augment import SINGLE_PROCESS, Process
from terminator_jax.data.examples import Batch
from terminator_jax.errors import InputError

# The last poems of the bundled sonnets are the test set.
NUM_TEST_POEMS = 5


@dataclasses.dataclass(frozen=True)
class Text:
    """Holds a text in memory and reads it as grids of bytes.

    Attributes:
        data: the bytes of the text, uint8.
        name: name of the text in messages.
        grid: rows and columns of a grid.

    Example:
        >>> text = Text(np.frombuffer(b"the quality of mercy", np.uint8), "mercy", (2, 3))
        >>> len(text)
        3
        >>> [row.tobytes() for row in text.read(np.array([1]))["tokens"][0]]
        [b'ali', b'ty ']
    """

    data: np.ndarray
    name: str
    grid: tuple[int, int]

    checksum: ClassVar[str] = ""  # it has a name and a version

    def __len__(self) -> int:
        return len(self.data) // self.bytes_per_grid

    @property
    def bytes_per_grid(self) -> int:
        """The number of bytes in a grid."""
        return self.grid[0] * self.grid[1]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes: a text has none."""
        return ()

    def read(self, indices: np.ndarray) -> Batch:
        """Reads the grids at `indices (n,)`: `tokens (n, *grid)` and their `index (n,)`."""
        indices = np.asarray(indices)
        tokens = self.grids_at(indices * self.bytes_per_grid)
        return {"tokens": tokens, "index": indices.astype(np.int32)}

    def grids_at(self, starts: np.ndarray) -> np.ndarray:
        """Reads the grids that start at these bytes."""
        positions = starts[:, None] + np.arange(self.bytes_per_grid)
        return self.data[positions].reshape(-1, *self.grid)

    def load(self) -> "Text":
        """Returns itself: the text is in memory already."""
        return self


@dataclasses.dataclass(frozen=True)
class RandomStart(grain.transforms.RandomMap):
    """Shifts each grid by a random number of bytes, so that a byte occurs at every position.

    Grid number n starts at one of its own bytes. A grid that would extend past the end of the text
    wraps around to its start.

    Args:
        text: the text to read.
        process: the part of the global batch that the transformation sees.

    Example:
        >>> text = Text(np.arange(20, dtype=np.uint8), "numbers", (2, 3))
        >>> batch = RandomStart(text).random_map(text.read(np.arange(3)), np.random.default_rng(0))
        >>> batch["tokens"][:, 0, 0]
        array([5, 9, 0], dtype=uint8)
    """

    text: Text
    process: Process = SINGLE_PROCESS

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """Replaces the grids of the batch by shifted ones."""
        text, index = self.text, element["index"].astype(np.int64)
        count = text.bytes_per_grid
        shifts = self.process.draw_local(lambda shape: rng.integers(0, count, shape), index.shape)
        starts = (index * count + shifts) % (len(text.data) - count + 1)
        return {**element, "tokens": text.grids_at(starts)}


def open_text(
    dataset: str,
    split: str,
    grid: tuple[int, int],
    *,
    data_dir: str = "",
    download: bool = False,
) -> Text:
    """Reads one split of a text data set.

    Args:
        dataset: the name of a TFDS data set with a feature `text`, or `"sonnets"`, forty bundled
            sonnets of Shakespeare.
        split: the name of a split, e.g. `"train"`; the sonnets have `train` and `test`.
        grid: rows and columns of a grid.
        data_dir: the directory of TFDS data sets, as for `sources.open_split`.
        download: whether TFDS may download and prepare the data set.

    Raises:
        InputError: if there is no such text, or if it is shorter than a grid.

    Example:
        >>> len(open_text("sonnets", "test", (16, 16)))
        11
    """
    read = BUNDLED.get(dataset)
    data = read(split) if read else _from_tfds(dataset, split, data_dir, download)
    text = Text(np.frombuffer(data, np.uint8), f"{dataset} {split}", tuple(grid))
    if len(text) == 0:
        raise InputError(
            f"{text.name} has {len(data)} bytes, which do not fill a grid of {grid[0]} rows and"
            f" {grid[1]} columns: choose a smaller config.data.grid"
        )
    return text


def _sonnets(split: str) -> bytes:
    whole = Path(__file__).with_name("sonnets.txt").read_bytes()
    poems = whole.split(b"\n\n")
    parts = {"train": poems[:-NUM_TEST_POEMS], "test": poems[-NUM_TEST_POEMS:]}
    if split not in parts:
        raise InputError(f"sonnets has no split {split!r}: it has {', '.join(parts)}")
    return b"\n\n".join(parts[split])


BUNDLED: dict[str, Callable[[str], bytes]] = {"sonnets": _sonnets}


def _from_tfds(dataset: str, split: str, data_dir: str, download: bool) -> bytes:
    builder = sources.open_builder(dataset, data_dir=data_dir, download=download, bundled=BUNDLED)
    if "text" not in builder.info.features:
        raise InputError(
            f"{builder.name} is no set of texts: it has {', '.join(builder.info.features)}, and a"
            " 'text' is needed"
        )
    examples = sources.random_access(builder, split)
    return b"\n\n".join(e["text"] for e in examples.__getitems__(range(len(examples))))
