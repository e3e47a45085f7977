"""The course of a run: early stopping, and what the log says about it."""

import json
import math

import pytest

from terminator_jax.training import history, loop

STILL = ["epochs=8", "optimizer.learning_rate=1e-30"]  # no evaluation is better than the first


def lines(*scores, metric="accuracy"):
    return [{"kind": "eval", "step": n, metric: score} for n, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "count"),
    [((), 0), ((0.5,), 0), ((0.5, 0.6), 0), ((0.5, 0.5), 1), ((0.6, 0.5, 0.5), 2), ((1, 2, 1), 1)],
)
def test_evaluations_without_improvement(scores, count):
    """An equal one is none, and a smaller loss is one."""
    assert history.without_improvement(lines(*scores), "accuracy") == count
    losses = lines(*(-score for score in scores), metric="ema_loss")
    losses.insert(0, {"kind": "train", "step": 0, "loss": 0})
    assert history.without_improvement(losses, "ema_loss") == count
    assert history.is_stale(losses, "ema_loss", 2) == (count >= 2)
    assert not history.is_stale(losses, "ema_loss", 0)


def test_the_best_is_the_last_of_equals():
    assert history.best([], "accuracy") is None
    assert history.best(lines(0.5, 0.7, 0.7, 0.6), "accuracy")["step"] == 2
    assert history.best(lines(0.5, 0.3, 0.6, metric="loss"), "loss")["step"] == 1


def test_a_log_is_read_up_to_a_step_and_without_what_is_damaged(tmp_path):
    assert history.read(tmp_path, 9) == []
    lines = [{"kind": "train", "step": step, "epoch": 1, "loss": 0.5} for step in (1, 2, 3)]
    damaged = ("[1]", "7", '{"kind": 1, "step": 1, "epoch": 1}', '{"kind": "train", "step": "1"}',
               '{"kind": "eval", "step": 1, "epoch": 1, "loss": "x"}', "[" * 100_000)  # fmt: skip
    text = "\n".join([*map(json.dumps, lines), *damaged, '{"kind": "tr'])
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n" + text.encode())
    assert history.read(tmp_path, 2) == lines[:2]
    (tmp_path / "log.jsonl").write_text('{"kind": "eval", "step": 1, "epoch": 1, "loss": null}')
    [line] = history.read(tmp_path, 2)
    assert math.isnan(line["loss"]) and history.best([line, *lines], "loss") == line


def test_a_run_ends_when_it_becomes_no_better(make, tmp_path):
    """And called again it is done, until it may go on for longer."""
    config = make(*STILL, "early_stopping_epochs=2", normalize=False)
    result = loop.train(config, tmp_path)
    assert (result.step, result.total, result.stopped_early) == (66, 176, True)
    assert result.is_done and not result.already_finished
    assert loop.train(config, tmp_path) == result._replace(already_finished=True)
    config.early_stopping_epochs = 4
    longer = loop.train(config, tmp_path)
    assert (longer.step, longer.already_finished, longer.stopped_early) == (110, False, True)
    config.early_stopping_epochs = 0
    whole = loop.train(config, tmp_path)
    assert (whole.step, whole.stopped_early, whole.is_done) == (176, False, True)


def test_a_run_that_becomes_better_does_not_end_early(make, tmp_path):
    result = loop.train(make("epochs=4", "early_stopping_epochs=1", "best_metric=loss"), tmp_path)
    assert (result.step, result.stopped_early) == (88, False)


def test_what_the_command_says(run_main, make, tmp_path):
    fields = [*STILL, "early_stopping_epochs=1", "model.options.normalize=False"]
    flags = ["--config=tests/training/small.py", f"--workdir={tmp_path}"]
    flags += [f"--config.{field}" for field in fields]
    make()  # registers the model
    for state in ("done", "was done already"):
        code, out, _ = run_main("train", *flags)
        says = f"{state}: 44 steps of 176, as --config.early_stopping_epochs says; best eval acc"
        assert code == 0 and says in out


def test_checkpoints_that_are_kept(make, tmp_path):
    """Every second epoch, the last and the best: with a rate of nearly 0 all are equally good."""
    config = make(*STILL, "keep_every_epochs=3", "checkpoint_every_steps=5", normalize=False)
    loop.train(config, tmp_path)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [66, 132, 176]
