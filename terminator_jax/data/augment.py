"""Augmentation of whole batches of uint8 pictures, as grain transformations.

A batch is what `pipeline` makes: a dict whose `image` is `(batch, height, width, channels)`.
Drawing once for a batch instead of once for a picture is what makes them fast.

Each transformation is told which part of the global batch it sees. It draws for the global batch
and takes its own part, so that a picture is cropped and flipped the same way however many processes
share the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

PADDINGS = {"symmetric": "symmetric", "zeros": "constant"}

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes that share every batch: process `index` of `count`.

    Example:
        >>> Process(1, 4).rows(32)
        slice(8, 16, None)
    """

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch of `batch_size` pictures that belong to this process."""
        own = batch_size // self.count
        return slice(self.index * own, (self.index + 1) * own)

    def draw(self, sample: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...]) -> Any:
        """This process's rows of what `sample` draws for the global batch; `shape` is its own."""
        size = shape[0] * self.count
        return sample((size, *shape[1:]))[self.rows(size)]


ALONE = Process()


@dataclasses.dataclass(frozen=True)
class RandomCrop(grain.transforms.RandomMap):
    """Pads each picture and crops it to its old size at a random place.

    Args:
        padding: pixels added on each side, so that shifts go from `-padding` to `padding`.
        mode: what the padding is made of, `"symmetric"` (the picture mirrored, edge pixel
            included) or `"zeros"` (which makes it a plain shift).
        process: the part of the global batch that the transformation sees.

    Example:
        >>> batch = {"image": np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)}
        >>> crop = RandomCrop(1, "zeros")
        >>> crop.random_map(batch, np.random.default_rng(0))["image"][0, :, :, 0]
        array([[ 4,  5,  6,  7],
               [ 8,  9, 10, 11],
               [12, 13, 14, 15],
               [ 0,  0,  0,  0]], dtype=uint8)
    """

    padding: int
    mode: str = "symmetric"
    process: Process = ALONE

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """The batch with its pictures cropped; labels and mask stay as they are."""
        images, pad = element["image"], self.padding
        count, height, width, _ = images.shape
        corners = self.process.draw(lambda shape: rng.integers(0, 2 * pad + 1, shape), (count, 2))
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), PADDINGS[self.mode])
        # (count, 2 pad + 1, 2 pad + 1, channels, height, width): a view of every possible crop.
        crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        chosen = crops[np.arange(count), corners[:, 0], corners[:, 1]]
        return {**element, "image": np.ascontiguousarray(np.moveaxis(chosen, 1, -1))}


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
    """Mirrors each picture left to right with probability 1/2.

    Args:
        process: the part of the global batch that the transformation sees.

    Example:
        >>> batch = {"image": np.arange(4, dtype=np.uint8).reshape(2, 1, 2, 1)}
        >>> RandomFlip().random_map(batch, np.random.default_rng(0))["image"].ravel()
        array([0, 1, 3, 2], dtype=uint8)
    """

    process: Process = ALONE

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """The batch with about half of its pictures mirrored; labels and mask stay as they are."""
        images = element["image"]
        flip = self.process.draw(lambda shape: rng.random(shape) < 0.5, (len(images), 1, 1, 1))
        return {**element, "image": np.where(flip, images[:, :, ::-1], images)}
