"""Augmentation against a literal loop, and shared between processes."""

import numpy as np
import pytest

from terminator_jax.data.augment import Process, RandomCrop, RandomFlip


def pictures(count=16, height=6, width=5, channels=2):
    shape = (count, height, width, channels)
    return {
        "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "label": np.arange(count, dtype=np.int32),
    }


def crops(image, padding, mode):
    """All crops of a padded picture, by place."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    height, width, _ = image.shape
    places = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    return {(y, x): padded[y : y + height, x : x + width] for y, x in places}


@pytest.mark.parametrize(("mode", "numpys"), [("symmetric", "symmetric"), ("zeros", "constant")])
def test_crops_are_shifts_and_all_of_them_occur(mode, numpys):
    batch = pictures(count=400)
    out = RandomCrop(1, mode).random_map(batch, np.random.default_rng(1))
    assert out["image"].dtype == np.uint8 and out["image"].flags["C_CONTIGUOUS"]
    assert np.array_equal(out["label"], batch["label"])
    places = []
    for before, after in zip(batch["image"], out["image"], strict=True):
        [place] = [p for p, c in crops(before, 1, numpys).items() if np.array_equal(c, after)]
        places.append(place)
    counts = [places.count((y, x)) for y in range(3) for x in range(3)]
    assert min(counts) > 20


def test_flips_mirror_about_half():
    batch = pictures(count=400)
    out = RandomFlip().random_map(batch, np.random.default_rng(1))["image"]
    same = np.array([np.array_equal(a, b) for a, b in zip(batch["image"], out, strict=True)])
    assert np.array_equal(out[~same], batch["image"][~same, :, ::-1])
    assert 150 < same.sum() < 250


@pytest.mark.parametrize("augmentation", [RandomCrop(1), RandomCrop(1, "zeros"), RandomFlip()])
def test_pictures_of_16_bits_and_any_number_of_channels(augmentation):
    batch = {"image": np.random.default_rng(0).integers(0, 2**16, (8, 4, 5, 6), np.uint16)}
    out = augmentation.random_map(batch, np.random.default_rng(1))["image"]
    assert out.dtype == np.uint16 and out.shape == batch["image"].shape
    for channel in range(6):
        alone = {"image": batch["image"][..., channel : channel + 1]}
        same = augmentation.random_map(alone, np.random.default_rng(1))["image"]
        assert np.array_equal(out[..., channel : channel + 1], same)


@pytest.mark.parametrize("make", [lambda p: RandomCrop(2, process=p), lambda p: RandomFlip(p)])
def test_processes_share_what_one_would_draw(make):
    batch = pictures()
    whole = make(Process()).random_map(batch, np.random.default_rng(3))["image"]
    parts = []
    for process in (Process(n, 4) for n in range(4)):
        own = {name: x[process.rows(16)] for name, x in batch.items()}
        parts.append(make(process).random_map(own, np.random.default_rng(3))["image"])
    assert np.array_equal(np.concatenate(parts), whole)
