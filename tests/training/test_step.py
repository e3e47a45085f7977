"""The step with a model that compiles in a moment, which needs a line in the table and no more."""

import json
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training import loop, metrics
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.meter import Meter
from terminator_jax.training.setup import make_run
from terminator_jax.training.step import make_train_step
from terminator_jax.training.trace import Trace


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_it_learns_the_digits(make, tmp_path, parallel, capsys):
    config = make("epochs=10", f"parallel={parallel}")
    result = loop.train(config, tmp_path)
    assert (result.step, result.total, result.already_finished) == (220, 220, False)
    assert result.best["accuracy"] > 0.85
    assert loop.train(config, tmp_path) == result._replace(already_finished=True)
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    scores = {line["step"]: line["accuracy"] for line in lines if line["kind"] == "eval"}
    assert scores[result.best_step] == max(scores.values()) == result.best["accuracy"]
    assert capsys.readouterr().out.count("epoch ") == 10


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_it_learns_from_mixed_pictures(make, tmp_path, parallel):
    fields = ["mixup_alpha=0.2", "cutmix_alpha=1.0", "rand_augment=1", "rand_augment_strength=0.1"]
    fields = [f"data.{field}" for field in fields]
    result = loop.train(make("epochs=10", f"parallel={parallel}", *fields), tmp_path)
    assert result.best["accuracy"] > 0.75
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    [*_, last] = [line for line in lines if line["kind"] == "train"]
    assert 0.3 < last["accuracy"] < 0.8  # some of the larger shares are hardly larger


def test_an_odd_number_of_pictures_has_no_pairs(make, tmp_path):
    with pytest.raises(InputError, match=r"config\.batch_size is 63, .* mix pairs"):
        loop.train(make("batch_size=63", "data.mixup_alpha=1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradients_are_those_of_the_whole_loss():
    """Also of the penalty of the parameters: here most of the loss."""
    fields = ["loss.l2=1", "model.options.dropout=(0.0,)", "parallel=jit"]
    config = configs.read("tests/training/tiny.py", [f"--config.{field}" for field in fields])
    run = make_run(config)
    tx, state = optax.trace(decay=0), run.state  # which keeps the gradient
    state = state._replace(opt_state=tx.init(state.params))
    batch = run.train_data.load().read(np.arange(64))

    def loss(params):
        model = run.model_def.merge(run.model_def.unravel(params), state.model_state)
        return run.task.loss(model, batch, nnx.Rngs(dropout=0))[0]

    step = make_train_step(run.task, run.model_def, tx, run.schedule)
    after, metrics = jax.jit(step)(state, batch)
    value, grad = jax.jit(jax.value_and_grad(loss))(state.params)
    assert metrics["l2"] > 0.5 * value
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    difference = optax.tree.sub(after.opt_state.trace, grad)
    assert optax.tree.norm(difference) < 1e-4 * optax.tree.norm(grad)


def test_dropout_differs_from_step_to_step_and_is_off_in_evaluation(make):
    run = make_run(make("optimizer.learning_rate=1e-9", dropout=0.5))
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
    )
    pictures = run.train_data.load()
    batch = run.parallel.shard_batch({**pictures.read(np.arange(64)), "mask": np.ones(64, bool)})
    evaluate = make_evaluate(run)
    before = evaluate()
    assert before == evaluate() and before["count"] == 360
    state, found = run.state, []
    for _ in range(3):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert len(set(found)) == 3
    assert int(state.step) == 3


def test_evaluation_uses_the_running_averages(make):
    """And so does not depend on how the pictures are put into batches."""
    runs = [make_run(make(f"eval_batch_size={size}")) for size in (40, 120)]
    first, second = (make_evaluate(run)() for run in runs)
    assert first == pytest.approx(second, rel=1e-5)


def test_what_is_no_parameter_is_updated_too(make):
    run = make_run(make())
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=False
    )
    state = run.state
    batch = next(run.train_batches())
    after, _ = step(state, run.parallel.shard_batch(batch))
    x = np.asarray(run.task.inputs(batch["image"])).reshape(64, -1)
    mean = after.model_state["norm"]["mean"][...]
    np.testing.assert_allclose(mean, 0.01 * x.mean(0), rtol=1e-3, atol=1e-6)


def test_a_donated_state_is_used_up(make):
    run = make_run(make())
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
    )
    state = run.state
    step(state, run.parallel.shard_batch(next(run.train_batches())))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_metrics_are_read_only_when_they_are_logged(make, tmp_path, monkeypatch):
    """Between the lines of the log, steps follow each other without waiting."""
    reads = []
    read = Meter.read
    monkeypatch.setattr(Meter, "read", lambda self: reads.append(len(self._pending)) or read(self))
    config = make("log_every_steps=20", "checkpoint_every_steps=0")
    loop.train(config, tmp_path)
    assert reads == [20, 2, 18, 4]


def test_a_metric_is_one_line_and_can_choose_the_best_checkpoint(
    make, tmp_path, monkeypatch, capsys
):
    """Here one that falls while the model learns: the first epoch's is the largest."""
    surprise = lambda logits, labels: 1 - metrics.is_correct(logits, labels)  # noqa: E731
    monkeypatch.setitem(metrics.METRICS, "error", surprise)
    result = loop.train(make("best_metric=error"), tmp_path)
    assert result.best_step == 22
    assert result.best["error"] == pytest.approx(1 - result.best["accuracy"])
    assert f"eval error {result.best['error']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_evaluating_keeps_the_scores(make, tmp_path, monkeypatch, number):
    make_evaluate = loop.make_evaluate

    def interrupted(run):
        evaluate = make_evaluate(run)
        return lambda: (signal.raise_signal(number), evaluate())[1]

    monkeypatch.setattr(loop, "make_evaluate", interrupted)
    result = loop.train(make(), tmp_path)
    assert (result.step, result.best_step) == (23, 22)


def test_a_trace_of_a_few_steps(make, tmp_path, monkeypatch):
    """What TensorBoard's profiler opens, with the operations of five steps in it."""
    calls = []
    start = jax.profiler.start_trace
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda directory: calls.append(directory) or start(directory)
    )
    loop.train(make("epochs=1", "optimizer.warmup_epochs=0.0"), tmp_path / "without")
    assert calls == []
    loop.train(make("epochs=1", "optimizer.warmup_epochs=0.0", "profile=True"), tmp_path / "with")
    [file] = (tmp_path / "with" / "plugins" / "profile").glob("*/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    names = [event.name for plane in profile.planes for row in plane.lines for event in row.events]
    assert sum(("train_step" in name and "Pjit" in name) or "pmap" in name for name in names) >= 5


def test_a_trace_ends_with_the_run(tmp_path):
    """Also if that is shorter: another trace could not begin otherwise."""
    with Trace(tmp_path, enabled=True) as trace:
        for done in range(1, 5):
            trace.step(done, jax.numpy.ones(3))
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "again")
    jax.profiler.stop_trace()


def test_devices_drop_different_entries(run_python):
    """Of a layer's own stream, and two layers different ones."""
    out = run_python(
        """
        import jax, json
        import jax.numpy as jnp
        from flax import nnx
        from terminator_jax.training.state import split_model
        from terminator_jax.training.step import _stream_key
        model_def, params, others = split_model(
            nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        )
        def dropped(x):
            streams = _stream_key(jax.random.key(0), "batch")
            return [layer(x) for layer in model_def.merge(params, others, streams).layers]
        found = jax.pmap(dropped, "batch")(jnp.ones((2, 50)))
        print(json.dumps([row.tolist() for layer in found for row in layer]))
        """,
        devices=2,
    )
    assert len({tuple(row) for row in json.loads(out)}) == 4
