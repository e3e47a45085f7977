"""Own pictures through the commands: a folder of files, an `.npz` of 16 bits."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from terminator_jax.data import sources

SMALL = Path(__file__).with_name("small.py")
# After a few epochs; 0.1 by chance.
LEARNT = 0.6


@pytest.fixture(scope="module")
def digits():
    return {split: sources.open_split("digits", split).load() for split in ("train", "test")}


def trained_and_evaluated(run_main, workdir, *fields):
    """The last evaluation of a training, after it was repeated by the other command."""
    flags = [f"--config.{field}" for field in ("epochs=5", *fields)]
    code, _, err = run_main("train", f"--config={SMALL}", f"--workdir={workdir}", *flags)
    assert code == 0, err
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    best = max((line for line in lines if line["kind"] == "eval"), key=lambda e: e["accuracy"])
    code, out, err = run_main("evaluate", f"--workdir={workdir}")
    assert code == 0, err
    assert f"{best['accuracy']:.4f}" in out
    return best


def test_a_folder_of_pictures(run_main, digits, tmp_path):
    names = [f"class {i}" for i in range(10)]
    for split, pictures in digits.items():
        for name in names:
            (tmp_path / "digits" / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(pictures.image, pictures.label, strict=True)):
            path = tmp_path / "digits" / split / names[label] / f"{number:04d}.png"
            PIL.Image.fromarray(image[..., 0]).save(path)
    fields = [f"data.name={tmp_path / 'digits'}", "data.in_memory=False"]
    best = trained_and_evaluated(run_main, tmp_path / "run", *fields)
    assert best["count"] == 360 and best["accuracy"] > LEARNT


def test_arrays_of_16_bits(run_main, digits, tmp_path):
    path = tmp_path / "digits.npz"
    train = digits["train"]
    np.savez(path, image=train.image.astype(np.uint16) * 257, label=train.label)
    fields = [f"data.name={path}", "data.eval_fraction=0.2"]
    best = trained_and_evaluated(run_main, tmp_path / "run", *fields)
    assert best["count"] == 287 and best["accuracy"] > LEARNT


def test_wrong_pictures_are_refused_before_training(run_main, tmp_path):
    path, workdir = tmp_path / "a.npz", tmp_path / "run"
    np.savez(path, image=np.zeros((200, 8, 8, 3), np.uint8), label=np.arange(200) % 10)
    flags = [f"--config={SMALL}", f"--workdir={workdir}", f"--config.data.name={path}"]
    code, _, err = run_main("train", *flags)
    assert code == 2 and err.count("\n") == 1
    assert f"{path} train has pictures of 3 channels, and the model is for 1" in err
