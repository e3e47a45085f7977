"""Augments whole batches of uint8 pictures, by grain transformations.

A batch comes from `pipeline`: a dict whose `image` is `(batch, height, width, channels)`. One draw
for a batch is faster than one for each picture.

Each transformation draws for the global batch and takes the rows of its own process. So the
augmentation of a picture does not depend on the number of processes that share the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from terminator_jax.data.examples import Batch

PADDINGS = {"symmetric": "symmetric", "zeros": "constant"}


@dataclasses.dataclass(frozen=True)
class Process:
    """Identifies one of the processes that share every batch: process `index` of `count`.

    Example:
        >>> Process(1, 4).rows(32)
        slice(8, 16, None)
    """

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """Returns this process's rows of a global batch of `batch_size` pictures."""
        own = batch_size // self.count
        return slice(self.index * own, (self.index + 1) * own)

    def draw_local(
        self, sample: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...]
    ) -> Any:
        """Draws for the global batch by `sample`, and returns this process's rows, of `shape`."""
        size = shape[0] * self.count
        return sample((size, *shape[1:]))[self.rows(size)]


SINGLE_PROCESS = Process()


@dataclasses.dataclass(frozen=True)
class RandomCrop(grain.transforms.RandomMap):
    """Pads each picture and crops it to its old size at a random position.

    Args:
        padding: pixels added on each side. A picture shifts by `-padding` to `padding` pixels.
        mode: the values of the padding: `"symmetric"` for the mirrored picture with its edge
            pixels, or `"zeros"`.
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
    process: Process = SINGLE_PROCESS

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """Crops the pictures of a batch; labels and mask stay as they are."""
        images, pad = element["image"], self.padding
        count, height, width, _ = images.shape
        corners = self.process.draw_local(
            lambda shape: rng.integers(0, 2 * pad + 1, shape), (count, 2)
        )
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

    process: Process = SINGLE_PROCESS

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """Mirrors about half of the pictures of a batch; labels and mask stay as they are."""
        images = element["image"]
        shape = (len(images), 1, 1, 1)
        flip = self.process.draw_local(lambda shape: rng.random(shape) < 0.5, shape)
        return {**element, "image": np.where(flip, images[:, :, ::-1], images)}


@dataclasses.dataclass(frozen=True)
class Mix(grain.transforms.RandomMap):
    """Mixes each picture with its neighbour in the batch, by MixUp or by CutMix.

    Pictures 0 and 1 are neighbours, 2 and 3, and so on. A batch is in random order, so the pairs
    are random. No pair crosses two processes.

    MixUp averages the two pictures, with a weight from Beta(alpha, alpha). CutMix copies a box of
    the neighbour into the picture; the part of the box within the picture, as a fraction of its
    area, is the neighbour's weight in the label.

    Args:
        num_classes: the number of classes.
        mixup_alpha: alpha of MixUp; 0 for CutMix alone.
        cutmix_alpha: alpha of CutMix; 0 for MixUp alone. With both, each picture has either with
            probability 1/2.
        process: the part of the global batch that the transformation sees.

    Example:
        >>> batch = {"image": np.full((2, 1, 1, 1), [[[[0]]], [[[100]]]], np.uint8)}
        >>> batch["label"] = np.array([0, 1], np.int32)
        >>> mixed = Mix(2, mixup_alpha=1.0).random_map(batch, np.random.default_rng(0))
        >>> mixed["image"].ravel(), mixed["label"]
        (array([30, 71], dtype=uint8), array([0, 1], dtype=int32))
        >>> mixed["soft_label"].round(2)
        array([[0.7 , 0.3 ],
               [0.29, 0.71]], dtype=float32)

    References:
        Zhang et al, `mixup: Beyond Empirical Risk Minimization
        <https://arxiv.org/abs/1710.09412>`_, 2018; Yun et al, `CutMix
        <https://arxiv.org/abs/1905.04899>`_, 2019
    """

    num_classes: int
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    process: Process = SINGLE_PROCESS

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        """Mixes the pictures of a batch and their labels.

        Adds `soft_label`, float32 `(batch, num_classes)`: the weights of the classes. `label`
        becomes the class of the larger weight.

        Raises:
            ValueError: if the number of pictures is odd.
        """
        images, labels = element["image"], element["label"]
        if len(images) % 2:
            raise ValueError(f"pairs are mixed, got {len(images)} pictures")
        neighbour = np.arange(len(images)) ^ 1
        weight = self._weights(images.shape[:3], rng)[..., None]
        mixed = weight * images + (1 - weight) * images[neighbour]
        share = weight.mean((1, 2, 3))
        classes = np.eye(self.num_classes, dtype=np.float32)[labels]
        soft = share[:, None] * classes + (1 - share[:, None]) * classes[neighbour]
        return {
            **element,
            "image": np.rint(mixed).astype(images.dtype),
            "label": np.where(share >= 0.5, labels, labels[neighbour]),
            "soft_label": soft,
        }

    def _weights(self, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
        """Draws the weight of each pixel of a picture: float32, `(batch, height, width)`."""
        count = shape[:1]
        mixup = cutmix = None
        if self.mixup_alpha:
            share = self.process.draw_local(lambda n: rng.beta(*2 * [self.mixup_alpha], n), count)
            mixup = np.broadcast_to(share.astype(np.float32)[:, None, None], shape)
        if self.cutmix_alpha:
            share = self.process.draw_local(lambda n: rng.beta(*2 * [self.cutmix_alpha], n), count)
            centre = self.process.draw_local(rng.random, (*count, 2))
            cutmix = 1 - _boxes(1 - share, centre, shape[1:]).astype(np.float32)
        if mixup is None or cutmix is None:
            return cutmix if mixup is None else mixup
        cuts = self.process.draw_local(rng.random, (*count, 1, 1)) < 0.5
        return np.where(cuts, cutmix, mixup)


def _boxes(area: np.ndarray, centre: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Makes masks of boxes, bool `(n, *size)`.

    Args:
        area: area of each box as a fraction of the picture's, `(n,)`. A box is cropped to the
            picture.
        centre: centre of each box, in [0, 1), `(n, 2)`.
        size: height and width of a picture.
    """
    half = np.sqrt(area)[:, None] / 2
    low, high = (np.rint((centre + side) * size)[..., None] for side in (-half, half))
    row, column = (np.arange(length) for length in size)
    inside = [(low[:, n] <= at) & (at < high[:, n]) for n, at in enumerate((row, column))]
    return inside[0][:, :, None] & inside[1][:, None, :]
