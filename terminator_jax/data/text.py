"""Texts as grids of bytes: one split of a TFDS text data set, or of the bundled sonnets.

text = open_text("sonnets", "train", (16, 16))
text.read(np.arange(3))["tokens"].shape  # (3, 16, 16)

A grid is read row after row. For evaluation a text is cut into grids, each byte in one of them; for
training they begin anywhere.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np

from terminator_jax.data import sources
from terminator_jax.data.augment import ALONE, Batch, Process
from terminator_jax.errors import InputError

# Of the sonnets, so many at the end are the test set.
TEST_POEMS = 5


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in memory, as grids of bytes.

    Attributes:
        data: its bytes, uint8.
        name: what it is, for messages.
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

    def __len__(self) -> int:
        return len(self.data) // self.cells

    @property
    def cells(self) -> int:
        """Bytes in a grid."""
        return self.grid[0] * self.grid[1]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of classes, of which a text has none."""
        return ()

    def read(self, indices: np.ndarray) -> Batch:
        """The grids at `indices`, `(n,)`, as `tokens` `(n, *grid)`, beside their `index` `(n,)`."""
        indices = np.asarray(indices)
        return {"tokens": self.at(indices * self.cells), "index": indices.astype(np.int32)}

    def at(self, starts: np.ndarray) -> np.ndarray:
        """The grids that begin at these bytes."""
        places = starts[:, None] + np.arange(self.cells)
        return self.data[places].reshape(-1, *self.grid)

    def load(self) -> "Text":
        """Itself, being in memory already."""
        return self


@dataclasses.dataclass(frozen=True)
class RandomStart(grain.transforms.RandomMap):
    """Lets each grid begin anywhere, so that a byte is seen in every place.

    Grid number n begins somewhere among its own bytes; what would reach over the end of the text
    begins as much after its start.

    Args:
        text: what is read.
        process: the part of the global batch that the transformation sees.

    Example:
        >>> text = Text(np.arange(20, dtype=np.uint8), "numbers", (2, 3))
        >>> batch = RandomStart(text).random_map(text.read(np.arange(3)), np.random.default_rng(0))
        >>> batch["tokens"][:, 0, 0]
        array([5, 9, 0], dtype=uint8)
    """

    text: Text
    process: Process = ALONE

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """The batch with other grids of the same text."""
        text, index = self.text, element["index"].astype(np.int64)
        shifts = self.process.draw(lambda shape: rng.integers(0, text.cells, shape), index.shape)
        starts = (index * text.cells + shifts) % (len(text.data) - text.cells + 1)
        return {**element, "tokens": text.at(starts)}


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
        dataset: a name that TFDS knows, of a set with a feature `text`, or `"sonnets"`, which is
            bundled: forty of Shakespeare's.
        split: `"train"`, `"validation"` and the like; the sonnets have `train` and `test`.
        grid: rows and columns of a grid.
        data_dir: where TFDS keeps its data sets, as for `sources.open_split`.
        download: lets TFDS download and prepare what is not prepared.

    Raises:
        InputError: if there is no such text, or it does not fill a grid.

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
    parts = {"train": poems[:-TEST_POEMS], "test": poems[-TEST_POEMS:]}
    if split not in parts:
        raise InputError(f"sonnets has no split {split!r}: it has {', '.join(parts)}")
    return b"\n\n".join(parts[split])


BUNDLED: dict[str, Callable[[str], bytes]] = {"sonnets": _sonnets}


def _from_tfds(dataset: str, split: str, data_dir: str, download: bool) -> bytes:
    builder = sources.prepared(dataset, data_dir=data_dir, download=download, bundled=BUNDLED)
    if "text" not in builder.info.features:
        raise InputError(
            f"{builder.name} is no set of texts: it has {', '.join(builder.info.features)}, and a"
            " 'text' is needed"
        )
    examples = sources.random_access(builder, split)
    return b"\n\n".join(e["text"] for e in examples.__getitems__(range(len(examples))))
