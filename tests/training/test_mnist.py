"""Real pictures from TFDS through the command, read from disk batch by batch."""

import json
import os
from pathlib import Path

import pytest

EXPERIMENT = """
import runpy
def get_config():
    tiny = runpy.run_path("tests/training/tiny.py")["get_config"]()
    config = runpy.run_path("experiments/mnist.py")["get_config"]()
    config.model.options = dict(tiny.model.options)
    config.optimizer.learning_rate = 0.003
    config.optimizer.warmup_epochs = 0.5
    return config
"""


def test_mnist(command, tmp_path):
    if not (Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "mnist").is_dir():
        pytest.skip("no mnist in TFDS_DATA_DIR")
    config, workdir = tmp_path / "experiment.py", tmp_path / "run"
    config.write_text(EXPERIMENT)
    fields = ["epochs=2", "data.train_split=train[:960]", "data.eval_split=test[:200]"]
    command.train(workdir, *fields, "data.in_memory=False", config=config)
    lines = list(map(json.loads, (workdir / "log.jsonl").read_text().splitlines()))
    first, last = (line for line in lines if line["kind"] == "eval")
    assert (first["step"], last["step"], last["count"]) == (15, 30, 200)
    assert last["loss"] < 2.3
