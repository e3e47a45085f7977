"""Pictures in memory, and how pictures are scaled: what every source of pictures shares."""

import dataclasses
from typing import Protocol

import numpy as np
import PIL.Image

Batch = dict[str, np.ndarray]

CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures that are all in memory.

    Attributes:
        image: uint8 or uint16, `(count, height, width, channels)`.
        label: int32, `(count,)`.
        name: what they are, for messages.
        num_classes: labels are in `[0, num_classes)`.
        classes: the names of the classes; empty if they have none.
    """

    image: np.ndarray
    label: np.ndarray
    name: str
    num_classes: int
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label)

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of a picture."""
        return self.image.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return self.image.dtype

    def read(self, indices: np.ndarray) -> Batch:
        """The pictures at `indices`, `(n,)`, as `image` `(n, *shape)` and `label` `(n,)`."""
        return {"image": self.image[indices], "label": self.label[indices]}

    def load(self) -> "Pictures":
        """Itself, being in memory already."""
        return self


class Stored(Protocol):
    """Pictures that are read one by one: `sources.Split` or `folder.Folder`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_classes: int
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """The pictures at `indices`, `(n,)`, as `image` `(n, *shape)` and `label` `(n,)`."""
        ...


def load(stored: Stored) -> Pictures:
    """Reads every picture into memory."""
    image = np.empty((len(stored), *stored.shape), stored.dtype)
    label = np.empty(len(stored), np.int32)
    for start in range(0, len(stored), CHUNK):
        rows = slice(start, min(start + CHUNK, len(stored)))
        batch = stored.read(np.arange(rows.start, rows.stop))
        image[rows], label[rows] = batch["image"], batch["label"]
    return Pictures(image, label, stored.name, stored.num_classes, stored.classes)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Returns a picture scaled to `side` pixels per side, each pixel a mean over what it covers.

    Every channel is scaled by itself: a fourth one is data as the others are, no transparency.

    Args:
        image: uint8 or uint16, `(height, width, channels)`.
        side: pixels per side; 0 leaves the picture as it is.

    Example:
        >>> image = np.array([[[0], [4000]], [[0], [4000]]], np.uint16)
        >>> resized(image, 1)
        array([[[2000]]], dtype=uint16)
    """
    if not side or image.shape[:2] == (side, side):
        return image
    return np.stack([_scaled(channel, side) for channel in np.moveaxis(image, -1, 0)], axis=-1)


def _scaled(channel: np.ndarray, side: int) -> np.ndarray:
    """One channel: 8 bits as integers, 16 bits as floats, which pillow scales both."""
    wide = channel.dtype != np.uint8
    picture = PIL.Image.fromarray(channel.astype(np.float32) if wide else channel)
    scaled = np.asarray(picture.resize((side, side), PIL.Image.Resampling.BILINEAR))
    return np.rint(scaled).astype(channel.dtype) if wide else scaled
