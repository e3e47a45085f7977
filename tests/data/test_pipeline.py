"""Batches of the real digits."""

import itertools

import numpy as np
import pytest

from terminator_jax.data import pipeline, sources
from terminator_jax.data.augment import SINGLE_PROCESS, Mix, Process, RandomCrop, RandomFlip
from terminator_jax.data.randaugment import RandAugment


@pytest.fixture(scope="module")
def digits():
    return sources.open_split("digits", "train")


@pytest.fixture(scope="module")
def numbered(digits):
    """The digits in memory, labelled with their own position."""
    pictures = digits.load()
    return sources.Pictures(
        pictures.image, np.arange(len(pictures), dtype=np.int32), "numbered", len(pictures)
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(first, second):
    return all(
        np.array_equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in a.keys() | b.keys()
    )


def augmented(pictures, process=SINGLE_PROCESS, seed=3):
    augmentations = [RandomCrop(1, "zeros", process), RandomFlip(process)]
    augmentations += [RandAugment(2, 0.3, process)]
    augmentations += [Mix(pictures.num_classes, 0.2, 1.0, process)]
    return pipeline.train_batches(
        pictures, 64, seed=seed, augmentations=augmentations, process=process
    )


def test_memory_and_disk_give_the_same_batches(digits):
    first, second = (take(augmented(p), 3) for p in (digits, digits.load()))
    assert same(first, second)
    assert first[0]["image"].shape == (64, 8, 8, 1) and first[0]["image"].dtype == np.uint8
    assert first[0]["label"].dtype == np.int32 and "mask" not in first[0]


def test_every_epoch_has_another_order_of_distinct_pictures(numbered):
    batches = take(pipeline.train_batches(numbered, 64, seed=0), 3 * 22)
    labels = np.stack([batch["label"] for batch in batches]).reshape(3, -1)
    assert all(len(set(epoch)) == 22 * 64 for epoch in labels)
    assert not np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[1], labels[2])
    assert set(labels[0]) != set(labels[1])  # other pictures are left over
    assert not np.array_equal(labels[0], np.sort(labels[0]))


def test_the_seed_decides(digits):
    pictures = digits.load()
    first, again, other = (take(augmented(pictures, seed=s), 2) for s in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def test_augmentation_differs_between_batches_and_epochs(numbered):
    """The same picture does not come out the same way each time."""
    batches = take(augmented(numbered), 10 * 22)
    outcomes = [b["image"][b["label"] == 7].tobytes() for b in batches if 7 in b["label"]]
    assert len(set(outcomes)) > 4


def test_processes_make_the_parts_of_the_same_batches(digits):
    pictures = digits.load()
    whole = take(augmented(pictures), 24)
    parts = [take(augmented(pictures, Process(n, 4)), 24) for n in range(4)]
    joined = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert same(joined, whole)


@pytest.mark.parametrize("done", [0, 5, 22, 30])
def test_an_iterator_goes_on_where_it_was(digits, done):
    pictures = digits.load()
    iterator = augmented(pictures)
    take(iterator, done)
    state, expected = iterator.get_state(), take(iterator, 4)
    other = augmented(pictures)
    other.set_state(state)
    assert same(take(other, 4), expected)


@pytest.mark.parametrize("processes", [1, 4])
def test_evaluation_counts_every_picture_once(numbered, processes):
    parts = [
        list(pipeline.eval_batches(numbered, 64, process=Process(n, processes)))
        for n in range(processes)
    ]
    assert all(len(part) == 23 for part in parts)
    assert all(len(batch["label"]) == 64 // processes for part in parts for batch in part)
    batches = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    kept = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert np.array_equal(kept, np.arange(1437))
    padding = batches[-1]["label"][~batches[-1]["mask"]]
    assert np.array_equal(padding, np.arange(23 * 64 - 1437))


def test_a_split_smaller_than_a_batch_is_repeated(numbered):
    few = sources.Pictures(numbered.image[:5], numbered.label[:5], "few", 5)
    [batch] = pipeline.eval_batches(few, 12)
    assert batch["label"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert batch["mask"].sum() == 5


def test_an_epoch_has_whole_updates_of_the_examples_of_one_large_batch(numbered):
    """1437 pictures are 22 updates of 64, or of 8 times 8: for three epochs."""
    large = take(pipeline.train_batches(numbered, 64, seed=3), 66)
    small = take(pipeline.train_batches(numbered, 8, seed=3, accumulate_steps=8), 66 * 8)
    labels = [np.concatenate([batch["label"] for batch in part]) for part in (large, small)]
    assert np.array_equal(*labels)
