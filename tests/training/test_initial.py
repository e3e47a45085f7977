"""Initial values from other models, frozen parameters, and runs that get more epochs."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from nets import filled

import terminator_jax
from terminator_jax import convert, loading
from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training import generation, loop
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.initial import initialize
from terminator_jax.training.setup import make_run
from terminator_jax.training.tasks import make_task

TINY = "tests/training/tiny.py"


def variables(state):
    """The arrays of a model or of its state by their names, without random streams."""
    kept = nnx.to_flat_state(nnx.filter_state(state, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in kept}


def everything(run):
    return variables(nnx.merge_state(run.named_parameters(), run.state.model_state))


def equal(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


@pytest.fixture
def save(tmp_path):
    """Writes a model of random values as a run does; returns its file and the values."""

    def save(config, classes=()):
        model, path = filled(make_task(config).make_model), tmp_path / "model.safetensors"
        text = configs.to_json(config)
        loading.save_model(path, nnx.state(model), config=text, classes=classes, step=7)
        return path, variables(nnx.state(model))

    return save


def test_a_run_begins_where_another_ended(make, tmp_path):
    """With its parameters and its running averages, named by its directory or by its file."""
    first = loop.train(make(), tmp_path / "first")
    for source in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        run = make_run(make(f"init_from={source}", "seed=5"))
        assert initialize(run) == f"initial values from {source}, step {first.best_step}"
        model = terminator_jax.load_model(tmp_path / "first").model
        assert equal(everything(run), variables(nnx.state(model)))
        scores = make_evaluate(run)()
        assert scores == pytest.approx(first.best, rel=1e-5)


def test_a_model_of_other_classes_gives_all_but_its_head(make, save, tmp_path, capsys):
    path, values = save(make("seed=3", num_classes=7), "abcdefg")
    run = make_run(make(f"init_from={path}"))
    before = everything(run)
    head = "a new head (linear.bias, linear.kernel): 7 classes there, 10 here"
    assert initialize(run) == f"initial values from {path}, step 7; {head}"
    head_values = {name: x for name, x in before.items() if name.startswith("linear.")}
    assert equal(everything(run), values | head_values)
    assert not np.array_equal(values["norm.scale"], before["norm.scale"])
    result = loop.train(make(f"init_from={path}"), tmp_path / "run")
    assert result.step == 44
    assert f"{head}\n" in capsys.readouterr().out


def test_the_release_gives_its_parameters(tmp_path, unoptimized):
    config = configs.read(TINY, [f"--config.init_from={tmp_path / 'release.npz'}"])
    del config.model.options["branches"]  # the release has always four
    run = make_run(config)
    model = filled(run.task.make_model)
    convert.write(tmp_path / "release.npz", convert.terminator_to_release(model))
    assert initialize(run) == f"initial values from the release's {tmp_path / 'release.npz'}"
    assert equal(everything(run), variables(nnx.state(model)))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nothing", None, "which does not exist: name a run's directory"),
        ("model.safetensors", b"", "cannot be read: "),
        ("model.npz", b"PK", "cannot be read: "),
        ("model.txt", b"", "cannot be read: cannot read .*: expected .ckpt"),
        ("run", "directory", "cannot be read: there is no trained model at "),
    ],
)
def test_sources_that_hold_no_model(make, tmp_path, name, content, says):
    path = tmp_path / name
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        loop.train(make(f"init_from={path}"), tmp_path / "out")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(make, save, tmp_path):
    path, _ = save(make(normalize=False))
    says = "does not fit: norm.bias is only here, norm.scale is only here: choose its config.model"
    with pytest.raises(InputError, match=says):
        loop.train(make(f"init_from={path}"), tmp_path / "out")
    path, _ = save(make())
    with pytest.raises(InputError, match=r"norm\.bias is only there, norm\.scale is only there"):
        loop.train(make(f"init_from={path}", normalize=False), tmp_path / "out")
    path, _ = save(make(size=(4, 4)))
    says = r"linear.kernel is \(16, 10\) there and \(64, 10\) here"
    with pytest.raises(InputError, match=says):
        loop.train(make(f"init_from={path}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_does_not_need_its_source(make, tmp_path):
    loop.train(make("epochs=2"), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "source")
    config = make(f"init_from={tmp_path / 'source'}")
    loop.train(config, tmp_path / "second")
    shutil.rmtree(tmp_path / "source")
    assert loop.train(config, tmp_path / "second").already_finished
    config.epochs = 3
    assert loop.train(config, tmp_path / "second").step == 66


def test_frozen_parameters_stay_as_they_are(make, tmp_path, capsys):
    """Also under weight decay, with a state of the optimizer for the others alone."""
    fields = ["freeze=^linear", "optimizer.weight_decay=10", "ema_decay=0.5"]
    config = make(*fields, "optimizer.clip_norm=1")
    before = everything(make_run(config))
    loop.train(config, tmp_path)
    assert "128 parameters and 650 frozen" in capsys.readouterr().out
    after = variables(nnx.state(terminator_jax.load_model(tmp_path).model))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"norm.scale", "norm.bias", "norm.mean", "norm.var"}
    run = make_run(config)
    assert {leaf.size for leaf in jax.tree.leaves(run.state.opt_state)} == {1, 128}
    config.epochs = 3
    loop.train(config, tmp_path)  # from a checkpoint
    again = variables(nnx.state(terminator_jax.load_model(tmp_path).model))
    assert np.array_equal(again["linear.kernel"], before["linear.kernel"])


def test_what_is_not_frozen_trains_as_ever(make, tmp_path):
    """A step changes the others as one without frozen parameters does."""
    found = []
    for fields in ([], ["freeze=kernel"]):
        config = make("epochs=1", "optimizer.warmup_epochs=0.0", "data.train_split=train[:64]",
                      *fields)  # fmt: skip
        loop.train(config, tmp_path / str(len(fields)))
        model = terminator_jax.load_model(tmp_path / str(len(fields))).model
        found.append(variables(nnx.state(model)))
    assert np.array_equal(found[0]["linear.bias"], found[1]["linear.bias"])
    assert not np.array_equal(found[0]["linear.kernel"], found[1]["linear.kernel"])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("conv", "is 'conv', and matches no parameter: they are named as linear.bias and norm"),
        (".", "is '.', and matches all 4 parameters: nothing would be trained"),
        ("mean", "matches no parameter"),
        ("(", r"config.freeze is '\(', and must be a regular expression"),
    ],
)
def test_patterns_that_are_refused(make, tmp_path, pattern, says):
    with pytest.raises(InputError, match=says):
        loop.train(make(f"freeze={pattern}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_gets_more_epochs(make, tmp_path, capsys):
    """The learning rate is that of a run of the new length."""
    assert loop.train(make(), tmp_path / "run").step == 44
    result = loop.train(make("epochs=4"), tmp_path / "run")
    assert (result.step, result.already_finished) == (88, False)
    out = capsys.readouterr().out
    says = "4 epochs instead of 2: the learning rate goes on as in a run of 4\n"
    assert out.count(says) == 1 and "epoch 4/4" in out
    loop.train(make("epochs=4"), tmp_path / "whole")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    ]
    rates = [
        {line["step"]: line["learning_rate"] for line in log if line["kind"] == "train"}
        for log in logs
    ]
    assert {step: rate for step, rate in rates[0].items() if step > 44} == {
        step: rate for step, rate in rates[1].items() if step > 44
    }
    assert sum(line["kind"] == "eval" for line in logs[0]) == 4
    assert loop.train(make("epochs=4"), tmp_path / "run").already_finished


def test_fewer_epochs_than_are_done(make, tmp_path):
    loop.train(make("epochs=3"), tmp_path)
    says = "holds 66 steps, and config.epochs, 2, are 44: raise it, or choose another --workdir"
    with pytest.raises(InputError, match=says):
        loop.train(make("epochs=2"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 3


def test_texts_come_from_averages_and_frozen_parameters(tmp_path, unoptimized):
    """`generate` reads a checkpoint: the same parameters as those of the file."""
    flags = ["epochs=1", "ema_decay=0.9", "freeze=embed", "model.options.layers=1"]
    config = configs.read("tests/training/tiny_text.py", [f"--config.{flag}" for flag in flags])
    loop.train(config, tmp_path)
    _, model = generation.load(tmp_path)
    file = variables(nnx.state(terminator_jax.load_model(tmp_path).model))
    found = variables(nnx.state(model))
    assert found.keys() == file.keys()
    for name in file:
        np.testing.assert_allclose(found[name], file[name], rtol=1e-6)
