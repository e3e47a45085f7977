"""Data sets: the bundled digits, real prepared ones, and what is said of those that are missing."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from terminator_jax.data import digits, download, sources
from terminator_jax.errors import InputError


def test_digits_are_those_of_scikit_learn():
    original = load_digits()
    train, test = (sources.open_split("digits", split).load() for split in ("train", "test"))
    is_test = np.arange(1797) % 5 == 0
    for pictures, rows in ((train, ~is_test), (test, is_test)):
        assert np.array_equal(pictures.label, original.target[rows])
        assert np.abs(pictures.image[..., 0] / 255 * 16 - original.images[rows]).max() < 0.05
        assert (pictures.shape, pictures.num_classes) == ((8, 8, 1), 10)


def test_digits_are_prepared_by_several_processes_at_once(tmp_path, run_python):
    out = run_python(
        f"""
        import os, pathlib
        from terminator_jax.data import digits
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                builder = digits.open_builder(pathlib.Path({str(tmp_path)!r}))
                os._exit(0 if builder.info.splits["train"].num_examples == 1437 else 1)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        """
    )
    assert out == "[0, 0, 0]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_digits_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"data set of the digits in .* cannot be written: .* XDG_CACHE_HOME"
    ):
        digits.open_builder(tmp_path / "file")


@pytest.mark.parametrize("content", ["{...", "[]", "", '{"splits": 3}'])
def test_digits_whose_description_is_damaged(tmp_path, content):
    builder = digits.open_builder(tmp_path)
    (Path(builder.data_dir) / "dataset_info.json").write_text(content)
    with pytest.raises(InputError, match=r"digits cannot be read: .*: remove this folder, so "):
        sources.random_access(digits.open_builder(tmp_path), "train")


def test_read_is_in_the_order_asked_for():
    split = sources.open_split("digits", "test")
    pictures, indices = split.load(), np.array([5, 0, 5, 359])
    for read in (split.read(indices), pictures.read(indices)):
        assert np.array_equal(read["image"], pictures.image[indices])
        assert np.array_equal(read["label"], pictures.label[indices])


def test_parts_of_splits_and_resizing():
    part = sources.open_split("digits", "train[10:30]", resize=16)
    assert (len(part), part.shape, part.name) == (20, (16, 16, 1), "digits train[10:30]")
    small, large = sources.open_split("digits", "train[10:30]").load(), part.load()
    assert large.image.shape == (20, 16, 16, 1)
    assert np.array_equal(large.label, small.label)
    means = [pictures.image.mean(axis=(1, 2, 3)) for pictures in (small, large)]
    assert np.abs(means[0] - means[1]).max() < 4


@pytest.mark.parametrize(
    ("dataset", "split", "says"),
    [
        ("digits", "valid", "digits has no split 'valid': it has train, test"),
        ("digits", "train[:0]", "digits train\\[:0\\] is empty"),
        ("mnits", "train", "there is no data set 'mnits'"),
        ("mnist:9.9.9", "train", "data set 'mnist:9.9.9': "),
    ],
)
def test_what_does_not_exist(dataset, split, says):
    with pytest.raises(InputError, match=says):
        sources.open_split(dataset, split)


def test_not_prepared_is_said_at_once(tmp_path):
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        sources.open_split("mnist", "train", data_dir=str(tmp_path))
    assert time.perf_counter() - start < 5
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert "copy a prepared mnist/3.0.1" in str(error.value)
    assert "--config.data.download=True" in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ModuleNotFoundError("no", name="tensorflow.io"),
            "TFDS needs tensorflow to prepare svhn_cropped",
        ),
        (ImportError("no tensorflow"), "`python -m pip install tensorflow`"),
        (OSError("server\ngone"), "svhn_cropped cannot be downloaded: server gone"),
    ],
)
def test_download_fails(tmp_path, monkeypatch, error, says):
    def fail(builder, **_):
        raise error

    monkeypatch.setattr(download, "_check_network", lambda *_: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(InputError, match=says):
        sources.open_split("svhn_cropped", "train", data_dir=str(tmp_path), download=True)


def test_labels_out_of_range_are_refused():
    split = sources.open_split("digits", "test")
    few = dataclasses.replace(split, numbers=np.arange(9))
    with pytest.raises(InputError, match=r"digits test has a label 9, .* from 0 to 8"):
        few.load()


PREPARED = Path(os.environ.get("TFDS_DATA_DIR", "/nowhere"))


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist", (28, 28, 1), (60000, 10000)), ("cifar10", (32, 32, 3), (50000, 10000))],
)
def test_real_data_sets(name, shape, sizes):
    if not (PREPARED / name).is_dir():
        pytest.skip(f"no {name} in TFDS_DATA_DIR")
    splits = [sources.open_split(name, split) for split in ("train", "test")]
    assert tuple(map(len, splits)) == sizes
    assert all((split.shape, split.num_classes) == (shape, 10) for split in splits)
    batch = splits[0].read(np.arange(500))
    assert batch["image"].shape == (500, *shape) and batch["image"].max() == 255
    assert set(batch["label"]) == set(range(10))
