"""Checkpoints that were damaged on the disk, and states that are not finite."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from nets import without_optimizations

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training import integrity, loop
from terminator_jax.training.checkpoint import Checkpoints, latest_step
from terminator_jax.training.evaluation import evaluate_checkpoint
from terminator_jax.training.interrupt import StopSignals

SMALL = "tests/training/small.py"


def config(*fields):
    return configs.read(SMALL, [f"--config.{field}" for field in fields])


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the checkpoints of both of its epochs, steps 22 and 44."""
    workdir = tmp_path_factory.mktemp("trained")
    with without_optimizations():
        loop.train(config("keep_every_epochs=1"), workdir)
    assert steps(workdir) == [22, 44]
    return workdir


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def parameters(workdir):
    arrays = safetensors.numpy.load_file(workdir / "model.safetensors")
    return {name: array.tobytes() for name, array in arrays.items()}


def test_any_flipped_byte_of_any_file_is_found(finished):
    folder = finished / "checkpoints"
    files = [path for path in sorted((folder / "44").rglob("*")) if path.is_file()]
    assert len(files) > 4 and integrity.problem(folder, 44) == ""
    for path in files:
        before = path.read_bytes()
        place = len(before) // 2
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        name = path.relative_to(folder / "44").as_posix()
        assert integrity.problem(folder, 44) == f"has a damaged {name}"
        path.write_bytes(before[:-1])
        assert "damaged" in integrity.problem(folder, 44)
        path.unlink()
        assert integrity.problem(folder, 44) == f"lacks {name}"
        path.write_bytes(before)
    assert integrity.problem(folder, 44) == ""


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(finished, capsys):
    """The same end; a run is not called done because a folder has the right name."""
    expected = parameters(finished)
    file = next((finished / "checkpoints" / "44" / "state" / "d").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 255]) + content[101:])
    capsys.readouterr()
    result = loop.train(config("keep_every_epochs=1"), finished)
    assert (result.step, result.already_finished) == (44, False)
    out = capsys.readouterr().out
    assert f"the checkpoint of step 44 has a damaged state/d/{file.name}: it was moved to" in out
    assert "going on from step 22" in out
    assert (finished / "damaged" / "44" / "state" / "d" / file.name).exists()
    assert parameters(finished) == expected
    assert integrity.problem(finished / "checkpoints", 44) == ""


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe{", b"[]", b"[" * 100_000])
def test_a_configuration_that_is_lost_or_damaged_is_written_again(finished, content, capsys):
    file, expected = finished / "config.json", (finished / "config.json").read_text()
    shutil.rmtree(finished / "checkpoints" / "44")
    file.unlink() if content is None else file.write_bytes(content)
    assert loop.train(config("keep_every_epochs=1"), finished).is_done
    err = capsys.readouterr().err
    assert "it is written again as --config says" in err and "config.json" in err
    assert file.read_text() == expected


@pytest.mark.parametrize("name", ["log.jsonl", "events.out.*", "README.md", "model.safetensors"])
def test_damage_to_other_files_blocks_no_run(finished, name):
    shutil.rmtree(finished / "checkpoints" / "44")
    for file in finished.glob(name):
        file.write_bytes(np.random.default_rng(0).bytes(3000))
    assert loop.train(config("keep_every_epochs=1"), finished).step == 44
    assert steps(finished) == [22, 44]


def test_a_damaged_checkpoint_is_not_evaluated(finished):
    next((finished / "checkpoints" / "44").rglob("_METADATA")).write_text("")
    with pytest.raises(InputError, match=r"step 44 in .* has a damaged .*_METADATA"):
        evaluate_checkpoint(finished, 44)
    assert evaluate_checkpoint(finished, 22).step == 22


def test_damage_to_an_older_checkpoint_blocks_nothing(finished):
    next((finished / "checkpoints" / "22").rglob("_METADATA")).write_text("")
    result = loop.train(config("keep_every_epochs=1"), finished)
    assert result.already_finished and steps(finished) == [22, 44]


def test_checksums_of_removed_checkpoints_go_too(tmp_path):
    loop.train(config("checkpoint_every_steps=7"), tmp_path)
    kept = {int(path.stem) for path in (tmp_path / integrity.FOLDER).iterdir()}
    assert kept == {*steps(tmp_path)}
    assert latest_step(tmp_path) == 44


def test_checksums_of_a_removed_checkpoint_are_not_those_of_a_new_one(finished, monkeypatch):
    """Removed by hand and trained again, until a kill before its checksums are written."""
    shutil.rmtree(finished / "checkpoints" / "44")
    monkeypatch.setattr(integrity, "write", lambda *arguments: None)
    loop.train(config("keep_every_epochs=1", "on_nonfinite=skip"), finished)
    assert steps(finished) == [22, 44]
    assert integrity.problem(finished / "checkpoints", 44) == ""


def test_what_training_removes_meanwhile_is_not_evaluated(finished, trained, monkeypatch):
    """Another one is chosen; the one that was asked for by its step is said to be gone."""
    restore = Checkpoints.restore

    def removed(checkpoints, step, *arguments):
        shutil.rmtree(checkpoints.directory / "44", ignore_errors=True)
        return restore(checkpoints, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", removed)
        assert evaluate_checkpoint(finished).step == 22
        shutil.copytree(trained / "checkpoints" / "44", finished / "checkpoints" / "44")
        with pytest.raises(InputError, match="holds no checkpoint of step 44: there are 22"):
            evaluate_checkpoint(finished, 44)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("params", "the parameters are not finite at step 44"),
        ("model_state", "the running averages are not finite at step 44"),
        ("opt_state", "the averages of the optimizer are not finite at step 44"),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, field, says):
    """The loss is that of the parameters before a step, and may still be finite."""
    make_train_step = loop.make_train_step

    def with_nan(*arguments):
        step = make_train_step(*arguments)

        def poison(state, batch):
            state, metrics = step(state, batch)
            broken = jax.tree.map(
                lambda x: jnp.where(state.step == 44, jnp.nan, x)
                if jnp.issubdtype(x.dtype, jnp.inexact) else x,
                getattr(state, field),
            )  # fmt: skip
            return state._replace(**{field: broken}), metrics

        return poison

    monkeypatch.setattr(loop, "make_train_step", with_nan)
    with pytest.raises(InputError, match=says + r": .*the last checkpoint is of step 22"):
        loop.train(config(), tmp_path)
    assert steps(tmp_path) == [22]


def test_the_log_is_valid_json(tmp_path):
    logs = loop.Logs(tmp_path, step=0, total=4, steps_per_epoch=2)
    with logs:
        logs.log_train(1, {"loss": float("nan"), "accuracy": 0.5, "images_per_second": np.inf})

    def refuse(name):
        raise ValueError(name)

    [line] = (tmp_path / "log.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert (found["loss"], found["accuracy"], found["images_per_second"]) == (None, 0.5, None)


@pytest.mark.parametrize("stdout", ["open", "closed", "full"])
def test_signals_stop_after_the_step_and_one_that_insists_at_once(stdout):
    """A burst of signals, such as `timeout` and shells send, is one wish; so is a late SIGHUP."""
    code = """
import os, signal, sys, time
from terminator_jax.training import interrupt
interrupt.INSIST_S = 0.1
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
with interrupt.StopSignals() as signals:
    signal.raise_signal(signal.SIGUSR1)
    assert signals.number is None
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    time.sleep(0.2)
    signal.raise_signal(signal.SIGHUP)
    sys.stderr.write(signals.number.name)
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    if stdout == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full if stdout == "full" else subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "SIGTERM")
    if stdout == "open":
        assert done.stdout.startswith("\nstopping: the step is finished and saved first")


def test_a_thread_trains_without_signals():
    found = []

    def run():
        with StopSignals() as signals:
            found.append(signals.number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


HOLD = """
import sys, time
from pathlib import Path
from terminator_jax.training.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@contextlib.contextmanager
def held(workdir):
    """Another process that holds the lock of a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield rf"^process {process.pid} on .* trains in "
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_one_process_writes_and_its_crash_frees_the_directory(tmp_path):
    (tmp_path / "config.json").write_text("of the other")
    with held(tmp_path) as says, pytest.raises(InputError, match=says):
        loop.train(config(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "config.json").read_text() == "of the other"
    assert loop.train(config("epochs=1", "optimizer.warmup_epochs=0.0"), tmp_path).is_done


def test_what_another_process_may_be_writing_is_not_moved_away(finished):
    """What looks damaged may be removed at this moment."""
    next((finished / "checkpoints" / "44").rglob("_METADATA")).unlink()
    with held(finished) as says, pytest.raises(InputError, match=says):
        loop.train(config("keep_every_epochs=1"), finished)
    assert steps(finished) == [22, 44]


def test_another_process_has_trained_before_this_one_has_the_lock(tmp_path, monkeypatch):
    """It begins and ends while this one looks at its data."""
    short, compare_run, ended = (
        config("epochs=1", "optimizer.warmup_epochs=0.0"),
        loop.compare_run,
        [],
    )

    def slowly(*arguments):
        compare_run(*arguments)
        if not ended:
            ended.append(True)
            loop.train(short, tmp_path)

    monkeypatch.setattr(loop, "compare_run", slowly)
    with pytest.raises(InputError, match=r"another process has trained in .* meanwhile"):
        loop.train(short, tmp_path)
    assert steps(tmp_path) == [22]


def test_initial_values_are_taken_again_when_the_only_checkpoint_is_damaged(finished, tmp_path):
    again, fields = tmp_path / "again", ["epochs=1", f"init_from={finished}"]
    fields += ["optimizer.learning_rate=1e-9", "optimizer.warmup_epochs=0.0"]
    loop.train(config(*fields), again)
    expected = parameters(again)
    next((again / "checkpoints" / "22").rglob("_METADATA")).write_text("")
    loop.train(config(*fields), again)
    assert parameters(again) == expected
    assert (again / "damaged" / "22").is_dir()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"--workdir=.* cannot be written"):
        loop.train(config(), tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "kept"
