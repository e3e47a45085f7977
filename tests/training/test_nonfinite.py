"""Losses and gradients that are not finite: the run stops and says why, or leaves the step out."""

import json

import numpy as np
import pytest
import safetensors.numpy

from terminator_jax.data import pipeline
from terminator_jax.errors import InputError
from terminator_jax.training import loop

ORDER = pipeline.train_order(1437, 64, seed=0)


@pytest.fixture
def poison(monkeypatch):
    """Makes the labels of some steps NaN; those of one example in the batch are enough."""
    read = pipeline._read

    def poison(*steps):
        bad = [ORDER[step - 1].tolist() for step in steps]

        def poisoned(examples, process, indices):
            batch = read(examples, process, indices)
            labels = np.eye(10, dtype=np.float32)[batch["label"]]
            if indices.tolist() in bad:
                labels[3] = np.nan
            return batch | {"soft_label": labels}

        monkeypatch.setattr(pipeline, "_read", poisoned)

    return poison


def logged(workdir, kind):
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_stops_and_goes_on_without_the_step(tmp_path, poison, make, capsys):
    poison(30)
    says = r"the loss of step 30 is nan: .*nonfinite-30.json says more: lower .* is of step 22$"
    with pytest.raises(InputError, match=says):
        loop.train(make(), tmp_path)
    report = json.loads((tmp_path / "nonfinite-30.json").read_text())
    assert report["examples"] == ORDER[29].tolist()
    assert (report["step"], report["loss"], report["gradient_norm"]) == (30, "nan", "nan")
    assert report["gradient_norm/fast"] == "nan"

    result = loop.train(make("on_nonfinite=skip"), tmp_path)
    assert (result.step, result.is_done) == (44, True)
    assert (
        "the loss of step 30 is nan: the step was left out, 1 until now" in capsys.readouterr().out
    )
    assert [line["skipped"] for line in logged(tmp_path, "train")] == [0, 0, 1, 1]
    model = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert all(np.isfinite(array).all() for array in model.values())


def test_a_skipped_step_changes_nothing(tmp_path, poison, make):
    """Neither parameters nor averages nor the optimizer: only the number of steps."""
    from terminator_jax.training.setup import make_run
    from terminator_jax.training.step import make_train_step

    poison(1)
    run = make_run(make("ema_decay=0.9", "optimizer.warmup_epochs=0.0"))
    step = run.parallel.compile(make_train_step(run.task, run.model_def, run.tx, run.schedule))
    before = run.state
    after, metrics = step(before, run.parallel.shard_batch(run.train_batch(0)))
    assert (int(metrics["skipped"]), int(after.step)) == (1, 1)
    for name in ("params", "model_state", "opt_state", "key"):
        for old, new in zip(*map(leaves, (before, after), (name, name)), strict=True):
            np.testing.assert_array_equal(old, new)
    after, metrics = step(before, run.parallel.shard_batch(run.train_batch(1)))
    assert int(metrics["skipped"]) == 0 and float(abs(after.params - before.params).max()) > 0
    assert any((old != new).any() for old, new in zip(
        leaves(before, "model_state"), leaves(after, "model_state"), strict=True))  # fmt: skip


def test_the_learning_rate_in_the_log_is_that_of_the_update(tmp_path, poison, make):
    """Of two epochs of 22 steps, one of which warms up; a step that is left out makes no update."""
    poison(3)
    loop.train(make("on_nonfinite=skip", "log_every_steps=1"), tmp_path)
    rates = [line["learning_rate"] for line in logged(tmp_path, "train")]
    expected = 0.003 / 22 * np.array([0, 1, 2, 2, 3, 4])
    np.testing.assert_allclose(rates[:6], expected, rtol=1e-5)


def leaves(state, name):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(getattr(state, name))]


def test_a_run_that_skips_everything_stops(tmp_path, poison, make):
    poison(*range(3, 44))
    with pytest.raises(InputError, match="step 24 is nan, and no step of the epoch before was bet"):
        loop.train(make("on_nonfinite=skip", "log_every_steps=1"), tmp_path)


def test_an_evaluation_that_is_not_finite_is_not_saved(tmp_path, make, monkeypatch):
    monkeypatch.setattr(loop, "make_evaluate", lambda run: lambda: {"loss": np.inf, "count": 1.0})
    with pytest.raises(
        InputError, match=r"the evaluation's loss is inf at step 22: .*no checkpoint"
    ):
        loop.train(make(), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
