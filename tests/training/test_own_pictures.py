"""Own pictures through the commands: a folder of files, an `.npz` of 16 bits."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from terminator_jax.data import sources

SMALL = Path(__file__).with_name("small.py")
# Far more than by chance, 0.1, after two epochs.
LEARNT = 0.3


@pytest.fixture(scope="module")
def digits():
    return {split: sources.open_split("digits", split).load() for split in ("train", "test")}


def evaluations(workdir):
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def test_a_folder_of_pictures(command, digits, tmp_path):
    names = [f"class {i}" for i in range(10)]
    for split, pictures in digits.items():
        for name in names:
            (tmp_path / "digits" / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(pictures.image, pictures.label, strict=True)):
            path = tmp_path / "digits" / split / names[label] / f"{number:04d}.png"
            PIL.Image.fromarray(image[..., 0]).save(path)
    workdir = tmp_path / "run"
    command.train(workdir, f"data.name={tmp_path / 'digits'}", "data.in_memory=False")
    last = evaluations(workdir)[-1]
    assert last["count"] == 360 and last["accuracy"] > LEARNT
    out, _ = command.run("evaluate", f"--workdir={workdir}")
    assert f"{last['accuracy']:.4f}" in out


def test_arrays_of_16_bits(command, digits, tmp_path):
    path, workdir = tmp_path / "digits.npz", tmp_path / "run"
    train = digits["train"]
    np.savez(path, image=train.image.astype(np.uint16) * 257, label=train.label)
    command.train(workdir, f"data.name={path}", "data.eval_fraction=0.2")
    last = evaluations(workdir)[-1]
    assert last["count"] == 287 and last["accuracy"] > LEARNT
    out, _ = command.run("evaluate", f"--workdir={workdir}")
    assert f"{last['accuracy']:.4f}" in out


def test_wrong_pictures_are_refused_before_training(run_main, tmp_path):
    path, workdir = tmp_path / "a.npz", tmp_path / "run"
    np.savez(path, image=np.zeros((200, 8, 8, 3), np.uint8), label=np.arange(200) % 10)
    flags = [f"--config={SMALL}", f"--workdir={workdir}", f"--config.data.name={path}"]
    code, _, err = run_main("train", *flags)
    assert code == 2 and err.count("\n") == 1
    assert f"{path} train has pictures of 3 channels, and the model is for 1" in err
