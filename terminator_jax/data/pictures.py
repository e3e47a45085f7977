"""Pictures in memory, and how pictures are scaled: what every source of pictures shares."""

import dataclasses

import numpy as np
import PIL.Image

from terminator_jax.data.examples import Batch, LabelledPictures

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
        checksum: of the data set that they are a part of; "" for one that has a name of its own.
    """

    image: np.ndarray
    label: np.ndarray
    name: str
    num_classes: int
    classes: tuple[str, ...] = ()
    checksum: str = ""

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
        """Reads the pictures at `indices`, `(n,)`: `image` `(n, *shape)` and `label` `(n,)`."""
        return {"image": self.image[indices], "label": self.label[indices]}

    def load(self) -> "Pictures":
        """Returns itself, being in memory already."""
        return self

    def with_classes(self, numbers: np.ndarray, classes: tuple[str, ...]) -> "Pictures":
        """Returns the pictures with other classes, of which `numbers` has those of the labels."""
        label = numbers[self.label].astype(np.int32)
        return dataclasses.replace(self, label=label, classes=classes, num_classes=len(classes))


def load(stored: LabelledPictures) -> Pictures:
    """Reads every picture into memory."""
    image = np.empty((len(stored), *stored.shape), stored.dtype)
    label = np.empty(len(stored), np.int32)
    for start in range(0, len(stored), CHUNK):
        rows = slice(start, min(start + CHUNK, len(stored)))
        batch = stored.read(np.arange(rows.start, rows.stop))
        image[rows], label[rows] = batch["image"], batch["label"]
    return Pictures(image, label, stored.name, stored.num_classes, stored.classes, stored.checksum)


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
    return _scaled(image, (side, side)) if side else image


LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue, ITU-R BT.601


def converted(image: np.ndarray, channels: int) -> np.ndarray:
    """Returns pictures with other channels: grey (1), red, green and blue (3), or these and alpha.

    A picture of two or four channels has alpha as its last: without it, what is transparent becomes
    white. What has the wanted number of channels stays as it is.

    Args:
        image: uint8 or uint16, `(…, channels)`.
        channels: of the result: 1, 3 or 4.

    Raises:
        ValueError: if either has another number of channels.

    Example:
        >>> converted(np.array([[[255, 0, 0, 255]]], np.uint8), 1).tolist()
        [[[76]]]
    """
    have = image.shape[-1]
    if have == channels:
        return image
    if have not in (1, 2, 3, 4) or channels not in (1, 3, 4):
        raise ValueError(f"{have} channels cannot become {channels}")
    values, white = image.astype(np.float64), np.iinfo(image.dtype).max
    alpha = values[..., -1:] if have in (2, 4) else np.full_like(values[..., :1], white)
    values = values[..., : 1 if have < 3 else 3]
    if channels == 4:
        values = np.concatenate([np.broadcast_to(values, (*values.shape[:-1], 3)), alpha], -1)
    else:
        values = values * (alpha / white) + white - alpha
        values = values @ LUMA[:, None] if channels < values.shape[-1] else values
    return np.rint(np.broadcast_to(values, (*values.shape[:-1], channels))).astype(image.dtype)


def fitted(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a picture stretched to another size, with other channels: see `converted`.

    Args:
        image: uint8 or uint16, `(height, width, channels)`.
        shape: height, width and channels of the result.

    Raises:
        ValueError: if the channels cannot be converted.

    Example:
        >>> red = np.array([[[255, 0, 0, 255]]], np.uint8)
        >>> fitted(red, (2, 2, 1))[..., 0].tolist()
        [[76, 76], [76, 76]]
    """
    return _scaled(converted(image, shape[-1]), shape[:2])


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.stack([_scaled_channel(plane, size) for plane in np.moveaxis(image, -1, 0)], axis=-1)


def _scaled_channel(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales a channel: 8 bits as integers, 16 bits as floats, which pillow scales both."""
    wide = channel.dtype != np.uint8
    picture = PIL.Image.fromarray(channel.astype(np.float32) if wide else channel)
    scaled = np.asarray(picture.resize(size[::-1], PIL.Image.Resampling.BILINEAR))
    return np.rint(scaled).astype(channel.dtype) if wide else scaled
