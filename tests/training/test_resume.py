"""Runs that are killed, interrupted and called again."""

import json
import shutil
import signal
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import terminator_jax
from terminator_jax.data import sources
from terminator_jax.training import config as configs
from terminator_jax.training import loop, tasks
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.initial import initialize
from terminator_jax.training.lock import one_writer
from terminator_jax.training.meter import Meter
from terminator_jax.training.setup import make_run

# Kills the process when the checkpoint of step 35 is written but for its name.
KILL = textwrap.dedent("""
    import os, signal, sys

    def kill(event, arguments):
        if event == "os.rename" and os.fspath(arguments[1]).endswith("checkpoints/35"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
""")
# Leaves time for an interruption.
SLOW = textwrap.dedent("""
    import time
    from terminator_jax.training import meter
    add = meter.Meter.add
    meter.Meter.add = lambda self, step: (time.sleep(0.2), add(self, step))
""")
OFTEN = "checkpoint_every_steps=7"
TINY = "tests/training/tiny.py"


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The directory of a run that nothing disturbed, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    out, _ = command.train(workdir, OFTEN)
    return workdir, out


def log(workdir):
    """The log's lines without what a clock decides."""
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def state(workdir, step=44):
    """The bytes of every array in a checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    assert {"params", "opt_state", "key", "step"} <= tree.keys()
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_what_a_run_leaves(finished):
    workdir, out = finished
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert lines[3].startswith("done: 44 steps; best eval accuracy 0.")
    assert str(workdir / "checkpoints") in lines[4] and str(workdir / "log.jsonl") in lines[4]
    steps = [(line["kind"], line["step"]) for line in log(workdir)]
    saves = [7, 14, 21, 28, 35, 42]
    train = sorted({*range(5, 45, 5), *saves, 22, 44})
    assert steps == sorted(
        [*(("train", step) for step in train), ("eval", 22), ("eval", 44)],
        key=lambda line: (line[1], line[0] == "eval"),
    )
    assert all(line["count"] == 360 for line in log(workdir) if line["kind"] == "eval")
    assert list(workdir.glob("events.out.tfevents.*"))
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 64


def test_killed_while_saving_and_started_again_it_ends_the_same(command, finished, tmp_path):
    process = command.patched(KILL, OFTEN, workdir=tmp_path)
    assert process.wait(timeout=300) == -signal.SIGKILL
    process.communicate()
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert "28" in left and "35" not in left and any(name.startswith("35.") for name in left)
    out, _ = command.train(tmp_path, OFTEN)
    assert "going on from step 28" in out
    assert log(tmp_path) == log(finished[0])
    assert state(tmp_path) == state(finished[0])


def test_a_second_start_says_done(run_main, finished):
    workdir, _ = finished
    before = sorted(path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*"))
    code, out, _ = run_main(
        "train", f"--config={TINY}", f"--workdir={workdir}", f"--config.{OFTEN}"
    )
    assert code == 0 and "was done already: 44 steps" in out and str(workdir / "checkpoints") in out
    after = sorted(path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*"))
    assert before == after


def interrupt(process, workdir, after=0):
    """Sends Ctrl-C when a step above `after` is in the log; returns stdout."""
    file, patience = workdir / "log.jsonl", time.monotonic() + 240
    while not (file.exists() and any(line["step"] > after for line in log(workdir))):
        assert process.poll() is None and time.monotonic() < patience, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err == ""
    return out


def test_ctrl_c_saves_and_says_how_to_go_on(command, finished, tmp_path):
    out = interrupt(command.patched(SLOW, OFTEN, workdir=tmp_path), tmp_path)
    [step] = [int(line.split()[5]) for line in out.splitlines() if line.startswith("stopped")]
    assert 5 <= step < 22
    assert "python -m terminator_jax.train --config=" in out
    assert f"--workdir={tmp_path}" in out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]
    out, _ = command.train(tmp_path, OFTEN)
    assert f"going on from step {step}" in out
    assert state(tmp_path) == state(finished[0])


def test_another_configuration_in_the_same_directory(run_main, finished):
    fields = [OFTEN, "optimizer.learning_rate=0.5", "data.flip=True"]
    flags = [f"--workdir={finished[0]}", *(f"--config.{field}" for field in fields)]
    code, out, err = run_main("train", f"--config={TINY}", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert (
        "data.flip (False there, True now), optimizer.learning_rate (0.003 there, 0.5 now)" in err
    )


def test_evaluate(run_main, finished):
    workdir, printed = finished
    _, out, _ = run_main("evaluate", f"--workdir={workdir}")
    best = max(
        (line for line in log(workdir) if line["kind"] == "eval"), key=lambda x: x["accuracy"]
    )
    expected = f"step {best['step']}: accuracy {best['accuracy']:.4f}  loss {best['loss']:.4f}"
    assert out.splitlines()[0] == f"{expected}  360 pictures"
    assert "expected calibration error" in out
    by_batch = []
    for flags in ([], ["--statistics=batch"], ["--statistics=batch", "--config.eval_batch_size=8"]):
        _, out, _ = run_main("evaluate", f"--workdir={workdir}", "--json", *flags)
        by_batch.append(json.loads(out))
    assert by_batch[0]["accuracy"] == pytest.approx(best["accuracy"])
    assert sum(map(sum, by_batch[0]["confusion"])) == by_batch[0]["count"] == 360
    losses = {found["loss"] for found in by_batch}
    assert len(losses) == 3, "the batch decides"
    reported = f"{best['accuracy']:.4f} (loss {best['loss']:.4f}) at step {best['step']}"
    assert reported in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--step=7"], "holds no checkpoint of step 7: there are "),
        (["--step=last"], "--step is 'last', and must be a step's number or best"),
        (["--config.model.variant=mnist"], "another config.model.variant ('digits' there"),
        (["--config.data.eval_split=valid"], "digits has no split 'valid'"),
        (["--workdir=/nowhere"], "/nowhere holds no run"),
    ],
)
def test_evaluate_errors(run_main, finished, flags, says):
    code, out, err = run_main("evaluate", f"--workdir={finished[0]}", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path, unoptimized):
    """One of commit 5856282: 30 of 44 steps, beside the parameters with which that version ended.

    Its parameters and those of the optimizer's averages were kept by name, whatever the program
    made of them.
    """
    archive = Path(__file__).with_name("checkpoint_of_version_0_1.zip")
    shutil.unpack_archive(archive, tmp_path)
    config = configs.read("tests/training/tiny.py", ["--config.checkpoint_every_steps=0"])
    result = loop.train(config, tmp_path / "run")
    assert (result.step, result.already_finished) == (44, False)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "run" / "checkpoints" / "44" / "state")
    found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree["params"])])
    expected = np.load(tmp_path / "parameters_at_44.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_run_of_an_older_version_is_calibrated(run_main, tmp_path):
    """It has no running averages; load_model gives what that version gave."""
    archive = Path(__file__).with_name("checkpoint_of_version_0_1.zip")
    shutil.unpack_archive(archive, tmp_path)
    flags = (f"--workdir={tmp_path / 'run'}", "--json")
    code, out, err = run_main("evaluate", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "step 30 has no running averages: add --calibrate" in err
    _, out, _ = run_main("evaluate", *flags, "--statistics=batch")
    by_batch = json.loads(out)["accuracy"]
    with pytest.warns(UserWarning, match="has no running averages"):
        assert terminator_jax.load_model(tmp_path / "run").step == 30
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with one_writer(tmp_path / "run"):  # as if it were being trained
        code, _, err = run_main("evaluate", *flags, "--calibrate")
    assert (code, err.count("\n")) == (0, 1)
    assert "warning: model.safetensors is not written: process" in err
    for other in ("--size=9", "--config.data.mean=(0.9,)"):
        code, _, err = run_main("evaluate", *flags, "--calibrate", other)
        assert code == 0 and "is not written: leave --step, --size and --config.… away" in err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    _, out, _ = run_main("evaluate", *flags, "--calibrate")
    assert json.loads(out)["accuracy"] == pytest.approx(by_batch, abs=0.05)
    digits = sources.open_split("digits", "test").load()
    logits = terminator_jax.load_model(tmp_path / "run").logits(digits.image)
    assert (logits.argmax(-1) == digits.label).mean() == pytest.approx(json.loads(out)["accuracy"])
    assert run_main("evaluate", *flags)[0] == 2, "the checkpoint itself is as it was"


def test_a_run_whose_variables_had_other_names(run_main, tmp_path, unoptimized):
    """One of commit 1d856cb: loaded, evaluated, the begin of another run, and resumed.

    With the logits of that version, the loss of its evaluation and that of 22 more steps.
    """
    shutil.unpack_archive(Path(__file__).with_name("run_of_1d856cb.zip"), tmp_path)
    expected, workdir = np.load(tmp_path / "expected.npz"), tmp_path / "run"
    loaded = terminator_jax.load_model(workdir)
    images = sources.open_split("digits", "test").load().image[:16]
    np.testing.assert_allclose(loaded.logits(images), expected["logits"], rtol=1e-4, atol=1e-5)
    _, out, _ = run_main("evaluate", f"--workdir={workdir}", "--json")
    assert json.loads(out)["loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    config = configs.read("tests/training/tiny.py", [f"--config.init_from={workdir}"])
    run = make_run(config)
    initialize(run)
    assert make_evaluate(run)()["loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    result = loop.train(configs.read("tests/training/tiny.py", []), workdir)
    assert result.step == 44
    log = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "eval"]
    assert losses[-1] == pytest.approx(expected["losses"][1], rel=1e-5)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_an_ordinary_dropout_goes_on_as_if_never_stopped(parallel, tmp_path, monkeypatch):
    """`nnx.Dropout(rate, rngs=rngs)` in a model: resumed bit for bit, and loaded."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    config = configs.read("tests/training/small.py", [f"--config.parallel={parallel}"])
    config.model.options = {"dropout": 0.5}
    whole = loop.train(config, tmp_path / "whole")
    add, steps = Meter.add, []

    def stop(meter, metrics):
        steps.append(metrics)
        add(meter, metrics)
        if len(steps) == 30:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "add", stop)
        assert loop.train(config, tmp_path / "parts").step == 30
    assert loop.train(config, tmp_path / "parts") == whole
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    loaded = terminator_jax.load_model(tmp_path / "parts")
    images = sources.open_split("digits", "test").load()
    hits = loaded.logits(images.image).argmax(-1) == images.label
    assert hits.mean() == pytest.approx(whole.best["accuracy"], abs=1e-6)
