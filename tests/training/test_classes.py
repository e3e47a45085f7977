"""Classes of data and of models are the same by their names, in every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import terminator_jax
from terminator_jax import loading
from terminator_jax.data import sources
from terminator_jax.errors import InputError
from terminator_jax.training import loop
from terminator_jax.training.evaluation import evaluate_checkpoint
from terminator_jax.training.initial import initialize
from terminator_jax.training.setup import make_run

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEST = sources.open_split("digits", "test").load()
BY_NUMBER = "--config.data.match_classes=number"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A trained model of the digits and its accuracy."""
    from terminator_jax.training import config as configs

    config = configs.read("tests/training/small.py", ["--config.epochs=4"])
    workdir = tmp_path_factory.mktemp("runs") / "small"
    return workdir, loop.train(config, workdir).best["accuracy"]


def folder(root, names, images=TEST.image, labels=TEST.label, split="", keep=range(10)):
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label in keep:
            path = root / split / names[label] / f"{n:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image[..., 0]).save(path)
    return root


def accuracy(workdir, data, *flags):
    return evaluate_checkpoint(workdir, overrides=[f"--config.data.name={data}", *flags]).scores


def test_the_same_names_in_any_order_are_matched(small, tmp_path):
    workdir, wanted = small
    order = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    np.savez(
        tmp_path / "order.npz", image=TEST.image, label=np.argsort(order)[TEST.label],
        classes=order.astype(str),
    )  # fmt: skip
    found = accuracy(workdir, tmp_path / "order.npz")
    assert found["count"] == 360 and found["accuracy"] == pytest.approx(wanted)
    whole = accuracy(workdir, folder(tmp_path / "digits", "0123456789"))
    assert whole["confusion"] == found["confusion"] and whole["count"] == 360


def test_some_of_the_classes_and_nothing_but_a_test_set(small, tmp_path):
    workdir, wanted = small
    some = folder(tmp_path / "some", "0123456789", split="test", keep=(7, 2))
    found = accuracy(workdir, some)
    assert found["count"] == np.isin(TEST.label, (7, 2)).sum()
    assert [row["count"] > 0 for row in found["per_class"]] == [n in (2, 7) for n in range(10)]
    assert found["accuracy"] > wanted - 0.1


def test_other_names_are_refused_unless_by_number(small, tmp_path, run_main):
    workdir, wanted = small
    data = folder(tmp_path / "digits", [f"{n} {word}" for n, word in enumerate(WORDS)])
    name = f"--config.data.name={data}"
    code, out, err = run_main("evaluate", f"--workdir={workdir}", name)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert "the classes are 0 zero, 1 one," in line and "the model's are 0, 1, 2," in line
    assert line.endswith(f"rename them, or set {BY_NUMBER}")
    assert accuracy(workdir, data, BY_NUMBER)["accuracy"] == pytest.approx(wanted)
    from_one = folder(tmp_path / "from one", [str(n + 1) for n in range(10)])
    with pytest.raises(InputError, match="without 10: rename"):
        accuracy(workdir, from_one)
    assert accuracy(workdir, from_one, BY_NUMBER)["accuracy"] == pytest.approx(wanted)
    with pytest.raises(InputError, match="11 classes are more than the model's 10"):
        accuracy(workdir, folder(from_one, ["0"] * 10), BY_NUMBER)


@pytest.fixture
def own(tmp_path):
    """Own digits in folders for splits."""
    for split in ("train", "test"):
        data = sources.open_split("digits", split).load()
        folder(tmp_path / "digits", "0123456789", data.image[:300], data.label[:300], split)
    return tmp_path / "digits"


def test_a_run_goes_on_with_its_classes_and_pictures(make, own, tmp_path, monkeypatch):
    """Wherever they lie and however that is spelt; with others it does not."""
    workdir, config = tmp_path / "run", make("optimizer.warmup_epochs=0.0")

    def train(name, epochs):
        config.data.name, config.epochs = str(name), epochs
        return loop.train(config, workdir).step

    first = train(own, 1)
    known = json.loads((workdir / "data.json").read_text())
    assert known["classes"] == list("0123456789") and known["count"] == 300

    monkeypatch.chdir(tmp_path)
    moved = shutil.move(own, tmp_path / "moved")
    assert train("./moved/", 2) == 2 * first
    again = evaluate_checkpoint(workdir, overrides=[f"--config.data.name={moved}"])
    assert again.scores["count"] == 300  # what it was trained with has a part held out

    for split in ("train", "test"):  # the names change places in the order
        (Path(moved) / split / "0").rename(Path(moved) / split / "x")
    with pytest.raises(InputError, match=r"the classes are 1, 2, .* x, and the model's are 0, 1,"):
        train("moved", 3)
    for split in ("train", "test"):
        (Path(moved) / split / "x").rename(Path(moved) / split / "0")
    (Path(moved) / "train" / "0" / "new.png").write_bytes(
        next((Path(moved) / "train" / "1").iterdir()).read_bytes()
    )
    with pytest.raises(InputError, match="has 301 pictures, and had 300 when the run began"):
        train("moved", 3)


def test_pictures_are_found_where_they_lay(make, own, tmp_path, monkeypatch):
    fields = ["data.name=./digits", "optimizer.warmup_epochs=0.0"]
    once, twice = (make(f"epochs={n}", *fields) for n in (1, 2))
    monkeypatch.chdir(tmp_path)
    loop.train(once, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate_checkpoint(tmp_path / "run").scores["count"] == 300
    assert loop.train(twice, tmp_path / "run").step == 8


def test_a_damaged_record_of_the_data_is_written_again(make, own, tmp_path, capsys):
    flat = own.parent / "flat"
    (own / "train").rename(flat)
    config = make(f"data.name={flat}", "optimizer.warmup_epochs=0.0", "epochs=1")
    loop.train(config, tmp_path / "run")
    record = tmp_path / "run" / "data.json"
    before = record.read_text()
    held_out = evaluate_checkpoint(tmp_path / "run").scores["count"]
    for content in (b"\xff\xfe", b"[]", b'{"classes": 3}'):
        record.write_bytes(content)
        assert evaluate_checkpoint(tmp_path / "run").scores["count"] == held_out
    assert "data.json cannot be read: " in capsys.readouterr().err
    config.epochs = 2
    loop.train(config, tmp_path / "run")
    assert record.read_text() == before


def test_another_model_gives_its_head_by_name(make, own, tmp_path, small):
    """For the same classes in another order and for some of them; for others it is new."""
    source, _ = small
    for names in ("jabcdefghi", "0123456789"):
        file = tmp_path / f"{names}.npz"
        np.savez(
            file, image=TEST.image, label=(TEST.label + 1) % 10,
            classes=list(names if names[0] == "j" else "9012345678"),
        )  # fmt: skip
        run = make_run(make(f"init_from={source}", f"data.name={file}"))
        line = initialize(run)
        kernel = run.named_parameters()["linear"]["kernel"][...]
        model = terminator_jax.load_model(source).model
        if names[0] == "j":
            assert line.endswith(
                "a new head (linear.bias, linear.kernel): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 there, "
                "j, a, b, c, d, e, f, g, h, i here"
            )
            assert not np.array_equal(kernel, np.roll(model.linear.kernel[...], 1, axis=1))
        else:
            assert np.array_equal(kernel, np.roll(model.linear.kernel[...], 1, axis=1))
    some = folder(tmp_path / "some", "0123456789", keep=(2, 7))
    fields = [f"data.name={some}", "batch_size=8"]
    run = make_run(make(f"init_from={source}", *fields, num_classes=2))
    assert "new head" not in initialize(run)
    kernel = run.named_parameters()["linear"]["kernel"][...]
    assert np.array_equal(kernel, model.linear.kernel[...][:, [2, 7]])


def test_a_loaded_model_numbers_classes_by_name(small):
    loaded = loading.load_model(small[0])
    assert loaded.class_numbers(["7", "0"]).tolist() == [7, 0]
    with pytest.raises(ValueError, match="without ten"):
        loaded.class_numbers(["7", "ten"])
