"""What a model is trained on: `Examples`, which are read by their numbers.

| class | where the examples lie |
|---|---|
| `pictures.Pictures` | pictures in memory, and those of an `.npz` |
| `sources.Split` | pictures of a TFDS data set, on disk |
| `folder.Folder` | pictures in a folder of files |
| `text.Text` | grids of bytes of a text in memory |
"""

from typing import Protocol

import numpy as np

# Arrays of n examples, by name.
Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """Examples of any kind.

    Attributes:
        name: what they are, for messages.
        classes: the names of the classes; empty if they have none.
        checksum: of the whole data set, for own pictures; "" for one that has a name of its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def checksum(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """Reads the examples at `indices`, `(n,)`: arrays of n entries by name."""
        ...

    def load(self) -> "Examples":
        """Reads all of them into memory."""
        ...


class LabelledPictures(Examples, Protocol):
    """Pictures: `read` gives `image`, `(n, *shape)`, and `label`, `(n,)`.

    Attributes:
        shape: height, width and channels of a picture.
        dtype: uint8 or uint16.
        num_classes: labels are in `[0, num_classes)`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.typing.DTypeLike: ...

    @property
    def num_classes(self) -> int: ...

    def with_classes(self, numbers: np.ndarray, classes: tuple[str, ...]) -> "LabelledPictures":
        """Returns the pictures with other classes, of which `numbers` has those of the labels."""
        ...
