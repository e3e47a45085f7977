"""RandAugment: what each operation does, and that its draws are those of the seed."""

import numpy as np
import pytest
from PIL import Image

from terminator_jax.data.augment import Process
from terminator_jax.data.randaugment import OPERATIONS, RandAugment


def pictures(count=16, size=24, channels=3):
    """Waves with a little noise, large enough for a histogram to be made even."""
    y, x = np.mgrid[:size, :size] / size
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(1, 4, (3, count, 1, 1, channels))
    values = 128 + 90 * np.sin(a * x[..., None] + b * y[..., None] + c)
    values += rng.uniform(-20, 20, values.shape)
    return {"image": values.astype(np.uint8), "label": np.arange(count, dtype=np.int32)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, channels):
    """Each keeps size and mode; those with a level change more, the larger it is."""
    image = pictures(1, channels=channels)["image"][0]
    before = Image.fromarray(image.squeeze())
    changes = []
    for level in (0.0, 0.5, 1.0, -1.0):
        after = OPERATIONS[name](before, level)
        assert (after.size, after.mode) == (before.size, before.mode)
        changes.append(np.abs(np.asarray(after, int) - image.squeeze()).mean())
    if name in ("autocontrast", "equalize"):
        assert len(set(changes)) == 1 and changes[0] > 1
    elif name == "identity" or (name == "color" and channels == 1):
        assert changes == [0, 0, 0, 0]
    else:
        assert changes[0] == 0 and 0 < changes[1] < changes[2] and changes[3] > 0


def test_moves_by_parts_of_the_size():
    image = np.zeros((20, 20), np.uint8)
    image[10, 10] = 255
    moved = np.asarray(OPERATIONS["translate_x"](Image.fromarray(image), 1.0))
    assert np.argwhere(moved).tolist() == [[10, 1]]
    sheared = np.asarray(OPERATIONS["shear_y"](Image.fromarray(image), 1.0))
    assert np.argwhere(sheared)[:, 1].tolist() == [10] * len(np.argwhere(sheared))


def test_all_operations_occur_and_labels_stay():
    batch = {"image": np.repeat(pictures(1)["image"], 400, 0), "label": np.arange(400)}
    out = RandAugment(1, 0.5).random_map(batch, np.random.default_rng(0))
    assert np.array_equal(out["label"], batch["label"]) and out["image"].dtype == np.uint8
    outcomes = {image.tobytes() for image in out["image"]}
    expected = {
        np.asarray(operation(Image.fromarray(batch["image"][0]), level)).tobytes()
        for operation in OPERATIONS.values()
        for level in (0.5, -0.5)
    }
    assert outcomes == expected
    more = RandAugment(3, 0.5).random_map(batch, np.random.default_rng(0))["image"]
    assert len({image.tobytes() for image in more}) > 200


def test_processes_share_what_one_would_draw():
    batch = pictures()
    whole = RandAugment(2, 0.5).random_map(batch, np.random.default_rng(3))["image"]
    parts = []
    for process in (Process(n, 4) for n in range(4)):
        own = {name: x[process.rows(16)] for name, x in batch.items()}
        augmentation = RandAugment(2, 0.5, process)
        parts.append(augmentation.random_map(own, np.random.default_rng(3))["image"])
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("wrong", [np.zeros((2, 4, 4, 2), np.uint8), np.zeros((2, 4, 4, 3), "u2")])
def test_pictures_that_pillow_does_not_know(wrong):
    with pytest.raises(ValueError, match="expected uint8 of 1 or 3 channels, got "):
        RandAugment(1, 0.5).random_map({"image": wrong}, np.random.default_rng(0))
