"""Batches of pictures, or of other examples, for training and for evaluation: grain pipelines.

A batch is what the examples' `read` gives, for pictures a dict of `image` (uint8, `(batch, height,
width, channels)`) and `label` (int32, `(batch,)`). One for evaluation also has a `mask` (bool,
`(batch,)`), False for the padding of the last batch.

Everything is a function of (seed, number of the batch): the order of the pictures, new in every
epoch, and what the augmentation draws. The processes of a run therefore see the parts of the same
global batches as a single process would, and an iterator's state is one number.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from terminator_jax.data.augment import SINGLE_PROCESS, Process
from terminator_jax.data.examples import Batch, Examples

PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def train_order(
    count: int, batch_size: int, *, seed: int, accumulate_steps: int = 1
) -> grain.MapDataset:
    """Returns which examples each training batch has, without end: `order[n]` for batch n from 0.

    The examples left over at an epoch's end are dropped. grain shuffles each repetition anew.

    Args:
        count: the number of examples.
        batch_size: examples in a batch of all processes together.
        seed: decides the order, in `[0, 2**32)`.
        accumulate_steps: batches of one update; an epoch has only whole updates.

    Example:
        >>> train_order(6, 2, seed=0)[3].shape
        (2,)
    """
    dataset = grain.MapDataset.range(count).seed(seed).shuffle()
    if accumulate_steps > 1:  # only then: each operation changes what those after it draw
        update = batch_size * accumulate_steps
        dataset = dataset.slice(slice(count // update * update))
    return dataset.batch(batch_size, drop_remainder=True).repeat()


def train_dataset(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    accumulate_steps: int = 1,
    augmentations: Sequence[grain.transforms.RandomMap] = (),
    process: Process = SINGLE_PROCESS,
) -> grain.MapDataset:
    """Returns the shuffled training batches without end: `dataset[n]` is batch n, from 0.

    Args:
        examples: where they come from.
        batch_size: examples in a batch of all processes together.
        seed: decides order and augmentation, in `[0, 2**32)`.
        accumulate_steps: batches of one update; an epoch has only whole updates.
        augmentations: applied in this order.
        process: the part of each batch that is made here.
    """
    order = train_order(len(examples), batch_size, seed=seed, accumulate_steps=accumulate_steps)
    dataset = order.map(functools.partial(_read, examples, process))
    for augmentation in augmentations:
        dataset = dataset.random_map(augmentation)
    return dataset


def train_batches(examples: Examples, batch_size: int, **options: Any) -> grain.DatasetIterator:
    """Returns an iterator of `train_dataset`, whose batches are made ahead of their use.

    `get_state()` and `set_state()` save and restore its position.
    """
    return iter(train_dataset(examples, batch_size, **options).to_iter_dataset(PREFETCH))


def eval_batches(
    examples: Examples, batch_size: int, *, process: Process = SINGLE_PROCESS
) -> Iterator[Batch]:
    """Gives every example once and in order, in batches of one size.

    The last batch is filled up with examples from the beginning, real ones, because with the
    statistics of the batch a prediction depends on all of it; their `mask` is False.

    Args:
        examples: where they come from.
        batch_size: examples in a batch of all processes together.
        process: the part of each batch that is made here.
    """
    count = len(examples)

    def read(start: int) -> Batch:
        positions = np.arange(start, start + batch_size)
        batch = _read(examples, process, positions % count)
        return {**batch, "mask": positions[process.rows(batch_size)] < count}

    starts = grain.MapDataset.source(range(0, count, batch_size))
    return iter(starts.map(read).to_iter_dataset(PREFETCH))


def _read(examples: Examples, process: Process, indices: np.ndarray) -> Batch:
    """Reads this process's rows of the global batch that holds the examples at `indices`."""
    return examples.read(indices[process.rows(len(indices))])
