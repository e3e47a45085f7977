"""Augmentation against a literal loop, and shared between processes."""

import numpy as np
import pytest

from terminator_jax.data.augment import Mix, Process, RandomCrop, RandomFlip


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


@pytest.mark.parametrize(
    "augmentation",
    [RandomCrop(1), RandomCrop(1, "zeros"), RandomFlip(), Mix(8, 1.0), Mix(8, 1.0, 1.0)],
)
def test_pictures_of_16_bits_and_any_number_of_channels(augmentation):
    batch = {"image": np.random.default_rng(0).integers(0, 2**16, (8, 4, 5, 6), np.uint16)}
    batch["label"] = np.arange(8)
    out = augmentation.random_map(batch, np.random.default_rng(1))["image"]
    assert out.dtype == np.uint16 and out.shape == batch["image"].shape
    for channel in range(6):
        alone = {**batch, "image": batch["image"][..., channel : channel + 1]}
        same = augmentation.random_map(alone, np.random.default_rng(1))["image"]
        assert np.array_equal(out[..., channel : channel + 1], same)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RandomCrop(2, process=p),
        lambda p: RandomFlip(p),
        lambda p: Mix(16, 0.5, 1.0, p),
    ],
)
def test_processes_share_what_one_would_draw(make):
    batch = pictures()
    whole = make(Process()).random_map(batch, np.random.default_rng(3))
    parts = []
    for process in (Process(n, 4) for n in range(4)):
        own = {name: x[process.rows(16)] for name, x in batch.items()}
        parts.append(make(process).random_map(own, np.random.default_rng(3)))
    for name in whole:
        assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def mixed(alphas, count=400):
    """A batch of bright pictures beside dark ones, before and after."""
    batch = pictures(count, height=10, width=10, channels=1)
    batch["image"] = np.broadcast_to(
        np.array([0, 200], np.uint8)[np.arange(count) % 2, None, None, None], (count, 10, 10, 1)
    )
    return batch, Mix(count, *alphas).random_map(batch, np.random.default_rng(1))


def check_labels(out, share):
    """`soft_label` and `label` of pictures of which `share` is their own."""
    count = len(share)
    expected = np.zeros((count, count))
    for n in range(count):
        expected[n, n], expected[n, n ^ 1] = share[n], 1 - share[n]
    np.testing.assert_allclose(out["soft_label"], expected, atol=1e-6)
    assert out["soft_label"].dtype == np.float32 and out["label"].dtype == np.int32
    assert np.array_equal(out["label"], expected.argmax(1))


@pytest.mark.parametrize(("alpha", "deviation"), [(1.0, 12**-0.5), (0.1, (4 * 1.2) ** -0.5)])
def test_mixup_adds_shares_of_brightness(alpha, deviation):
    """Each picture is even, of a brightness that is its share, drawn from Beta(alpha, alpha)."""
    _, out = mixed((alpha, 0.0), count=2000)
    assert (out["image"] == out["image"][:, :1, :1]).all() and out["image"].dtype == np.uint8
    own = out["soft_label"][np.arange(2000), np.arange(2000)]
    dark = np.arange(2000) % 2 == 0
    np.testing.assert_allclose(out["image"][:, 0, 0, 0], 200 * np.where(dark, 1 - own, own), atol=1)
    check_labels(out, own)
    assert abs(own.mean() - 0.5) < 0.03 and abs(own.std() / deviation - 1) < 0.1


def test_cutmix_puts_a_box_of_the_neighbour_into_each_picture():
    batch, out = mixed((0.0, 1.0))
    foreign = out["image"] != batch["image"]
    assert set(np.unique(out["image"])) == {0, 200}
    check_labels(out, 1 - foreign.mean((1, 2, 3)))
    for picture in foreign[..., 0]:
        rows, columns = picture.any(1), picture.any(0)
        assert np.array_equal(picture, rows[:, None] & columns[None])
        for side in (rows, columns):  # without a gap
            assert np.diff(np.flatnonzero(side)).max(initial=1) == 1
    sizes = foreign.mean((1, 2, 3))
    assert sizes.min() < 0.02 and sizes.max() > 0.7
    at_border = foreign[:, 0].any((1, 2)) | foreign[:, -1].any((1, 2))
    assert 0.3 < at_border.mean() < 0.9


def test_with_both_each_picture_has_one_of_them():
    batch, out = mixed((1.0, 1.0))
    cut = (out["image"] == 0) | (out["image"] == 200)
    cut = cut.all((1, 2, 3))
    assert 150 < cut.sum() < 250
    even = (out["image"] == out["image"][:, :1, :1]).all((1, 2, 3))
    assert (cut | even).all()
    changed = out["image"] != batch["image"]
    check_labels(out, out["soft_label"][np.arange(400), np.arange(400)])
    own = np.diag(out["soft_label"])
    np.testing.assert_allclose(own[cut], 1 - changed[cut].mean((1, 2, 3)), atol=1e-3)


def test_pairs_need_an_even_number():
    with pytest.raises(ValueError, match="pairs are mixed, got 3 pictures"):
        Mix(3, 1.0).random_map(pictures(3), np.random.default_rng(0))
