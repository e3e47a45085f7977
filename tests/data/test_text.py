"""Texts as grids: what is read, where training begins, the bundled sonnets, what is missing."""

import os
from pathlib import Path

import numpy as np
import pytest

from terminator_jax.data import pipeline, text
from terminator_jax.data.augment import Process
from terminator_jax.errors import InputError

NUMBERS = text.Text(np.arange(100, dtype=np.uint8), "numbers", (2, 3))


def test_grids_are_read_row_after_row_and_each_byte_once():
    batch = NUMBERS.read(np.array([3, 0]))
    assert batch["tokens"].tolist() == [[[18, 19, 20], [21, 22, 23]], [[0, 1, 2], [3, 4, 5]]]
    assert batch["tokens"].dtype == np.uint8
    assert (batch["index"].tolist(), batch["index"].dtype) == ([3, 0], np.int32)
    assert len(NUMBERS) == 16 and NUMBERS.load() is NUMBERS
    batches = list(pipeline.eval_batches(NUMBERS, 5))
    whole = np.concatenate([batch["tokens"][batch["mask"]] for batch in batches])
    assert (whole.ravel() == np.arange(96)).all()


def starts(process=Process(), seed=0, count=1600):  # noqa: B008  (frozen)
    batch = NUMBERS.read(np.tile(np.arange(16), count // 16)[process.rows(count)])
    found = text.RandomStart(NUMBERS, process).random_map(batch, np.random.default_rng(seed))
    assert (found["index"] == batch["index"]).all()
    first = found["tokens"][:, 0, 0].astype(int)
    assert (found["tokens"].reshape(-1, 6) == first[:, None] + np.arange(6)).all()
    return first


def test_training_begins_everywhere_with_each_share_of_the_text_as_often():
    found = starts()
    assert set(found) == set(range(95))
    own = np.tile(np.arange(15), 100)
    shift = found.reshape(100, 16)[:, :15].ravel() - 6 * own
    shift = shift[found.reshape(100, 16)[:, :15].ravel() >= 6]  # the others went round
    assert set(shift) == set(range(6))


def test_processes_share_what_one_would_draw():
    parts = [starts(Process(n, 4)) for n in range(4)]
    assert np.array_equal(np.concatenate(parts), starts())


def test_training_batches():
    batches = pipeline.train_batches(NUMBERS, 4, seed=1, augmentations=[text.RandomStart(NUMBERS)])
    first, second = next(batches), next(batches)
    assert first["tokens"].shape == (4, 2, 3)
    assert not np.array_equal(first["tokens"], second["tokens"])


def test_the_sonnets():
    train, test = (text.open_text("sonnets", split, (16, 16)) for split in ("train", "test"))
    assert (len(train), len(test), train.name) == (83, 11, "sonnets train")
    whole = train.data.tobytes() + b"\n\n" + test.data.tobytes()
    poems = whole.decode("ascii").strip().split("\n\n")
    assert len(poems) == len(set(poems)) == 40
    assert all(poem.count("\n") == 13 for poem in poems)
    assert poems[7].startswith("Shall I compare thee to a summer's day?\n")
    assert train.data.tobytes().endswith(b"To shun the heaven that leads men to this hell.")


@pytest.mark.parametrize(
    ("dataset", "split", "grid", "says"),
    [
        ("sonnets", "valid", (16, 16), "sonnets has no split 'valid': it has train, test"),
        (
            "sonnets",
            "test",
            (64, 64),
            "sonnets test has 2995 bytes, which do not fill a grid of 64",
        ),
        ("sonets", "test", (16, 16), "no data set 'sonets': take a bundled one .sonnets."),
        (
            "digits",
            "test",
            (16, 16),
            "digits is no set of texts: it has image, label, and a 'text'",
        ),
    ],
)
def test_what_does_not_exist(dataset, split, grid, says):
    with pytest.raises(InputError, match=says):
        text.open_text(dataset, split, grid)


def test_tiny_shakespeare_not_prepared(tmp_path):
    with pytest.raises(InputError, match=r"copy a prepared tiny_shakespeare/1\.0\.0"):
        text.open_text("tiny_shakespeare", "train", (16, 16), data_dir=str(tmp_path))


def test_tiny_shakespeare():
    if not (Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "tiny_shakespeare").is_dir():
        pytest.skip("no tiny_shakespeare in TFDS_DATA_DIR")
    train, valid = (
        text.open_text("tiny_shakespeare", split, (16, 32)) for split in ("train", "validation")
    )
    assert train.data.tobytes().startswith(b"First Citizen:\nBefore we proceed any further")
    assert (len(train.data), len(valid.data)) == (1_003_854, 55_770)
    assert len(set(train.data.tolist())) == 65
    with pytest.raises(InputError, match="no split 'valid': it has train, validation, test"):
        text.open_text("tiny_shakespeare", "valid", (16, 32))
