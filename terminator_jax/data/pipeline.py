"""Batches of pictures for training and for evaluation, as grain pipelines.

A batch is a dict of `image` (uint8, `(batch, height, width, channels)`), `label` (int32,
`(batch,)`) and `mask` (bool, `(batch,)`), False for the padding of the last evaluation batch.

Everything is a function of (seed, number of the batch): the order of the pictures, new in every
epoch, and what the augmentation draws. The processes of a run therefore see the parts of the same
global batches as a single process would, and an iterator's state is one number.
"""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from terminator_jax.data.augment import ALONE, Batch, Process
from terminator_jax.data.sources import Pictures, Split

PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def train_batches(
    pictures: Pictures | Split,
    batch_size: int,
    *,
    seed: int,
    augmentations: Sequence[grain.transforms.RandomMap] = (),
    process: Process = ALONE,
) -> grain.DatasetIterator:
    """Shuffled batches without end; the pictures left over at an epoch's end are dropped.

    Args:
        pictures: where they come from.
        batch_size: pictures in a batch of all processes together.
        seed: decides order and augmentation, in `[0, 2**32)`.
        augmentations: applied in this order.
        process: the part of each batch that is made here.

    Returns:
        An iterator of this process's batches. `get_state()` and `set_state()` save and restore its
        position.
    """
    dataset = (
        grain.MapDataset.range(len(pictures))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
        .map(functools.partial(_read, pictures, process))
    )
    for augmentation in augmentations:
        dataset = dataset.random_map(augmentation)
    return iter(dataset.to_iter_dataset(PREFETCH))


def eval_batches(
    pictures: Pictures | Split, batch_size: int, *, process: Process = ALONE
) -> Iterator[Batch]:
    """Every picture once and in order, in batches of one size.

    The last batch is filled up with pictures from the beginning, real ones, because a prediction
    of this network depends on its whole batch; their `mask` is False.

    Args:
        pictures: where they come from.
        batch_size: pictures in a batch of all processes together.
        process: the part of each batch that is made here.
    """
    count = len(pictures)

    def read(start: int) -> Batch:
        positions = np.arange(start, start + batch_size)
        batch = _read(pictures, process, positions % count)
        return {**batch, "mask": positions[process.rows(batch_size)] < count}

    starts = grain.MapDataset.source(range(0, count, batch_size))
    return iter(starts.map(read).to_iter_dataset(PREFETCH))


def _read(pictures: Pictures | Split, process: Process, indices: np.ndarray) -> Batch:
    """This process's rows of the global batch that holds the pictures at `indices`."""
    batch = pictures.read(indices[process.rows(len(indices))])
    return {**batch, "mask": np.ones(len(batch["label"]), bool)}
