"""The card of a run: what it says, when it is written, and what it leaves alone."""

import json
import re
import signal
import sys
import xml.etree.ElementTree as ET

import jax
import pytest

from terminator_jax.training import card, curve, loop
from terminator_jax.training.meter import Meter

COMMAND = "python -m terminator_jax.train --config=x --config.freeze='a|b'"


def sections(workdir):
    """The card's text by its headings; tables as rows of cells."""
    parts = re.split(r"^#+ (.*)$", (workdir / "README.md").read_text(), flags=re.MULTILINE)
    assert parts[0] == f"{card.MARK}\n"
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(text):
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_what_a_card_says(make, tmp_path):
    workdir = tmp_path / "my digits"
    fields = ["epochs=3", "ema_decay=0.9", "freeze=bias|scale", "data.train_split=train[:640]"]
    result = loop.train(make(*fields), workdir, COMMAND)
    found = sections(workdir)
    assert list(found) == [
        *("my digits", "Results", "Command", "Data", "Model", "Configuration", "Versions")
    ]
    assert "Done: 30 steps, 3 epochs." in found["my digits"]
    assert "On 360 pictures of digits test; the best is by `ema_accuracy`." in found["Results"]
    rows = table(found["Results"])
    assert rows[0] == [
        *("evaluation", "epoch", "step"),
        *("accuracy", "loss", "ema_accuracy", "ema_loss"),
    ]
    best = [f"{result.best[name]:.4f}" for name in rows[0][3:]]
    assert rows[2] == ["best", str(result.best_step // 10), str(result.best_step), *best]
    assert rows[3][:3] == ["last", "3", "30"]
    assert f"\n    {COMMAND}\n" in found["Command"]
    assert table(found["Data"])[2] == [
        "training",
        "digits train[:640]",
        "640 pictures",
        "8 × 8 × 1",
    ]
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in found["Data"]
    assert "640 parameters are trained and 138 frozen." in found["Model"]
    assert f'terminator_jax.load_model("{workdir}")' in found["Model"]
    changed = {row[0]: row[1:] for row in table(found["Configuration"])[2:]}
    assert changed["`freeze`"] == [r"`'bias\|scale'`", "`''`"]
    assert changed["`data.name`"] == ["`'digits'`", "`'cifar10'`"] and "`seed`" not in changed
    [text] = re.findall(r"```json\n(.*?)```", found["Configuration"], re.DOTALL)
    assert json.loads(text) == json.loads((workdir / "config.json").read_text())
    assert ["jax", jax.__version__] in table(found["Versions"])
    assert not list(workdir.glob(".*"))


def test_a_run_that_is_stopped_goes_on_and_ends_early(make, tmp_path, monkeypatch):
    """Its card says so each time."""
    fields = ["epochs=9", "optimizer.learning_rate=1e-30", "early_stopping_epochs=2"]
    config, add, seen = make(*fields, normalize=False), Meter.add, []

    def stop(meter, metrics):
        seen.append((tmp_path / "README.md").read_text())
        add(meter, metrics)
        if len(seen) == 30:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "add", stop)
        loop.train(config, tmp_path, "python first")
    assert "0 of 198 steps are done; the same command goes on. No evaluation yet." in seen[0]
    assert "curve.svg" not in seen[0] and "load_model" not in seen[0]
    assert "22 of 198 steps are done; the same command goes on." in seen[-1]
    text = (tmp_path / "README.md").read_text()
    assert "30 of 198 steps are done" in text and "python first" in text
    loop.train(config, tmp_path, "python second")
    text = (tmp_path / "README.md").read_text()
    assert "Ended early at step 66: 2 evaluations without a better `accuracy`." in text
    assert "python second" in text and "python first" not in text
    (tmp_path / "README.md").unlink()
    loop.train(config, tmp_path, "python third")  # has nothing left to do
    assert "Ended early at step 66" in (tmp_path / "README.md").read_text()


def test_a_readme_that_is_no_card_stays(make, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    loop.train(make(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert not (tmp_path / "curve.svg").exists()


LOG = [
    {"kind": kind, "epoch": epoch, "step": 10 * epoch, "loss": 4 / epoch, "ema_loss": 5 / epoch}
    for epoch in (1, 2, 4)
    for kind in ("train", "train", "eval")
]


def test_a_curve_is_drawn_of_its_points():
    drawn = curve.panels(LOG)
    assert drawn == {
        "loss": {
            "train": [(1, 4), (2, 2), (4, 1)],
            "eval": [(1, 4), (2, 2), (4, 1)],
            "average": [(1, 5), (2, 2.5), (4, 1.25)],
        }
    }
    ET.fromstring(curve.svg(drawn))


@pytest.mark.parametrize(
    "log",
    [
        [{"kind": "eval", "epoch": 1, "step": 1, "loss": 0.5, "accuracy": 1.0}],
        [*LOG, {"kind": "eval", "epoch": 5, "step": 50, "loss": float("nan"), "ema_loss": 1.0}],
    ],
)
def test_curves_of_one_point_or_without_a_number(log):
    text = curve.svg(curve.panels(log))
    ET.fromstring(text)
    assert "nan" not in text


def test_no_curve_before_an_evaluation():
    assert curve.panels([LOG[0]]) == {} == curve.panels([])


def test_without_matplotlib_there_is_no_curve(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curve.svg(curve.panels(LOG)) == ""
