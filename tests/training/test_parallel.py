"""The same training on one device and on eight, under pmap and jit, in one process and in two."""

import itertools
import json
import socket

import pytest
from nets import largest

from terminator_jax.training import config as configs
from terminator_jax.training import tasks
from terminator_jax.training.checkpoint import Checkpoints
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.setup import make_run

# Prints the losses of 20 steps and the last parameters' norm for each way to run them.
STEPS = """
import itertools, json
import jax, optax
from nets import filled
from terminator_jax.training import config as configs
from terminator_jax.training.setup import make_run
from terminator_jax.training.state import new_state, split_model
from terminator_jax.training.step import make_train_step

jax.config.update("jax_disable_most_optimizations", True)

def losses(parallel, devices, fields):
    fields = ["batch_size=16", f"parallel={{parallel}}", *fields]
    config = configs.read("tests/training/tiny.py", [f"--config.{{field}}" for field in fields])
    run = make_run(config, jax.devices()[:devices])
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
    )
    _, params, model_state = split_model(filled(run.task.make_model))
    state = run.parallel.replicate(new_state(params, model_state, run.tx, seed=0))
    found = []
    for batch in itertools.islice(run.train_batches(), 20):
        state, metrics = step(state, run.parallel.shard_batch(batch))
        found.append(float(metrics["loss"]))
    averages = jax.tree.leaves(state.model_state)
    return found, float(optax.tree.norm((state.params, averages)))

print(json.dumps([losses(*way, {fields}) for way in {ways}]))
"""


def difference(first, second):
    """The largest relative difference of the losses, and of the norm of parameters and averages."""
    pairs = [*zip(first[0], second[0], strict=True), (first[1], second[1])]
    return largest(abs(a - b) / abs(a) for a, b in pairs)


@pytest.mark.parametrize(
    ("fields", "x64", "limit"),
    [
        (["dtype=float64", "optimizer.name=sgd", "optimizer.learning_rate=0.05"], True, 1e-9),
        (["optimizer.name=kar3"], False, 1e-3),
    ],
)
def test_eight_devices_train_as_one_does(run_python, fields, x64, limit):
    ways = [("pmap", 1), ("pmap", 8), ("jit", 8)]
    found = json.loads(run_python(STEPS.format(fields=fields, ways=ways), devices=8, x64=x64))
    one, pmap, jit = found
    print(f"{fields}: pmap {difference(one, pmap):.1e}, jit {difference(one, jit):.1e}")
    assert len(set(one[0])) == 20
    assert difference(one, pmap) < limit
    assert difference(one, jit) < limit


SHARED = ["--config=tests/training/small.py", "--config.log_every_steps=1"]


def losses(workdir):
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def loss_of(workdir, step, monkeypatch):
    """The evaluation's loss of a checkpoint, which this one process reads."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    run = make_run(configs.read("tests/training/small.py"))
    run.restore(Checkpoints(workdir, read_only=True), step)
    return make_evaluate(run)()["loss"]


@pytest.fixture(scope="module")
def one_process(make_command, tmp_path_factory):
    """The losses of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    make_command(devices=2).run("train", *SHARED, f"--workdir={workdir}")
    return losses(workdir)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_two_processes_train_as_one_does(
    make_command, one_process, tmp_path, monkeypatch, parallel
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [*SHARED, f"--config.parallel={parallel}", f"--workdir={tmp_path}"]
    group = [f"--coordinator={coordinator}", "--num_processes=2"]
    two = [make_command().start("train", *flags, *group, f"--process_id={n}") for n in range(2)]
    (out, err), (silent, _) = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [0, 0], out + err
    assert "done: 44 steps" in out
    assert "epoch" not in silent and "done" not in silent
    pairs = itertools.zip_longest(one_process, losses(tmp_path), fillvalue=0)
    assert largest(abs(a - b) for a, b in pairs) < 1e-4
    assert abs(loss_of(tmp_path, 44, monkeypatch) - one_process[-1]) < 1e-4
