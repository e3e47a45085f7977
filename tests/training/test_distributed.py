"""Several real processes over loopback: what differs, what is lost, and how they stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from terminator_jax.training.distributed import differences

SMALL = "tests/training/small.py"
TRAIN = "from terminator_jax import train\ntrain.cli.run(train.main, is_service=True)"
# A sign of life is missed sooner than in earnest, for a shorter test.
SOON = "from terminator_jax.training import distributed\ndistributed.HEARTBEAT_S = 10"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def start(make_command, port):
    """Starts a piece of code as one of two processes; kills at the end what still runs."""
    started = []
    env = make_command().env

    def start(number, code, *flags, **slurm):
        group = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *([] if slurm else group), *flags],
            env=env | slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        with process:  # closes its pipes and waits for it
            pass


def ends(process, code):
    """stdout and stderr of a process that ends within two minutes; of code None not with 0."""
    out, err = process.communicate(timeout=120)
    fits = process.returncode != 0 if code is None else process.returncode == code
    assert fits, f"{process.returncode}\n{out}{err}"
    return out, err


def error_line(err):
    """The line for people, which JAX's own may surround."""
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def wait_for(condition, *processes):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def lines(workdir: Path):
    log = workdir / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_processes=2"], "--num_processes needs --coordinator and --process_id too"),
        (["--process_id=1"], "--process_id needs --coordinator and --num_processes too"),
        (["--process_id=0"], "--process_id needs --coordinator and --num_processes too"),
        (["--coordinator=x:1"], "--coordinator needs --num_processes and --process_id too"),
        (["x:1", 0, 0], "--num_processes is 0, and must be 1 or more"),
        (["x:1", -1, 0], "--num_processes is -1, and must be 1 or more"),
        (["x:1", 2, 2], "--process_id is 2, and must be from 0 to 1"),
        (["x:1", 2, -1], "--process_id is -1, and must be from 0 to 1"),
        (["localhost", 2, 0], "--coordinator is 'localhost', and must be HOST:PORT"),
        (["x:70000", 2, 0], "--coordinator is 'x:70000', and must be HOST:PORT"),
        (["x:²", 2, 0], "--coordinator is 'x:²', and must be HOST:PORT"),
        (["--distributed", "--process_id=1"], "--process_id and --distributed exclude each other"),
        (["--distributed", "--join_timeout=0"], "--join_timeout is 0, and must be 1 or more"),
        (["--distributed"], "--distributed finds no processes to join"),
        (["--distributed=none"], "--distributed finds no processes to join"),
    ],
)
def test_flags(run_main, tmp_path, flags, says):
    if not str(flags[0]).startswith("--"):
        names = ("coordinator", "num_processes", "process_id")
        flags = [f"--{name}={value}" for name, value in zip(names, flags, strict=True)]
    code, _, err = run_main("train", f"--config={SMALL}", f"--workdir={tmp_path / 'run'}", *flags)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ") and says in err
    assert not (tmp_path / "run").exists()


def test_port_is_taken(run_main, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"]
        code, _, err = run_main("train", f"--config={SMALL}", f"--workdir={tmp_path}", *flags)
    assert (code, err.count("\n")) == (1, 1), err
    assert f"process 0 cannot listen at 127.0.0.1:{port}: Address already in" in err


JOIN = """
import sys
from terminator_jax.training import cli, distributed
number, port = int(sys.argv[3].partition("=")[2]), sys.argv[1].rpartition(":")[2]

def main(_):
    distributed.join(f"127.0.0.1:{port}", 2, number, timeout_s=TIMEOUT)
    return steps()
"""


def test_a_process_that_does_not_come(start):
    """Neither to process 0 nor to process 1: each ends, with JAX's own words."""
    code = JOIN.replace("TIMEOUT", "1") + "cli.run(main)"
    for number in (0, 1):
        out, err = ends(start(number, code), None)
        assert out == "" and "DEADLINE_EXCEEDED" in err


def slurm(number):
    """What SLURM tells a process; JAX makes a port of the job's number."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def test_other_configuration_and_version(start, tmp_path):
    """JAX finds the two processes by itself; they end, since they are not alike."""
    flags = ["--distributed", f"--config={SMALL}", f"--workdir={tmp_path / 'run'}"]
    other = "import terminator_jax\nterminator_jax.__version__ = '0.0.9'\n"
    two = [
        start(0, TRAIN, *flags, "--config.data.in_memory=False", **slurm(0)),
        start(1, other + TRAIN, *flags, "--config.optimizer.learning_rate=0.25", **slurm(1)),
    ]
    err, same = [error_line(ends(process, 2)[1]) for process in two]
    assert err == same
    assert "config.optimizer.learning_rate is 0.003 in process 0 and 0.25 in process 1; " in err
    assert "terminator_jax is 0.1.0 in process 0 and 0.0.9 in process 1; " in err
    assert "in_memory" not in err
    assert not (tmp_path / "run").exists()


# Process 1 has other pictures, then another checkpoint; then it has SIGTERM at a step of its own.
STEPS = """
import os, signal, time
import numpy as np

class Examples:
    name = "digits"
    def __len__(self):
        return 40
    def read(self, indices):
        return {"image": indices + self.first}

def steps():
    examples = Examples()
    for examples.first, step in [(number, 0), (0, 22 * number), (0, 22)]:
        try:
            distributed.compare_run(examples, examples, step)
            print("alike", flush=True)
        except distributed.InputError as error:
            print(error, flush=True)
    for step in range(1, 2001):
        time.sleep(0.01)
        distributed.any_process(False)
        if number == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if distributed.stop_together(False, step):
            break
    print("stop", step, distributed.signal_of_any(None).name, flush=True)
    while True:
        distributed.any_process(False)

cli.run(main)
"""


def test_data_differ_and_a_process_is_killed(start):
    code = f"{SOON}\n" + JOIN.replace("TIMEOUT", "40") + STEPS
    two = [start(number, code) for number in range(2)]
    said = [list(read_to("stop", process)) for process in two]
    assert said[0] == said[1]
    data, checkpoint, alike, stop = said[0]
    assert "the training data is digits (40 examples, checksum " in data
    assert "the evaluation data is digits (40 examples, checksum " in data
    assert "checkpoint in --workdir is 0 in process 0 and 22 in process 1" in checkpoint
    assert alike == "alike" and stop.endswith(" SIGTERM")
    assert 3 < int(stop.split()[1]) < 2000
    two[1].kill()
    ends(two[0], None)


def read_to(word, process):
    """The lines of stdout up to one with a first word; Gloo's own are left out."""
    for line in process.stdout:
        if not line.startswith("[Gloo]"):
            yield line.strip()
        if line.startswith(word):
            return


def test_a_run_is_stopped_and_goes_on(start, tmp_path):
    """SIGSTOP to one ends both, SIGTERM to one stops both, and then they go on to the end."""
    flags = [f"--config={SMALL}", f"--workdir={tmp_path}", "--config.checkpoint_every_steps=11"]
    flags += ["--config.log_every_steps=11"]
    long = "--config.epochs=2000"

    two = [start(number, f"{SOON}\n{TRAIN}", *flags, long) for number in range(2)]
    wait_for(lambda: len(lines(tmp_path)) > 4, *two)
    os.kill(two[1].pid, signal.SIGSTOP)
    ends(two[0], None)
    os.kill(two[1].pid, signal.SIGCONT)
    ends(two[1], None)

    before = len(lines(tmp_path))
    two = [start(number, TRAIN, *flags, long) for number in range(2)]
    wait_for(lambda: len(lines(tmp_path)) > before, *two)
    sent = time.monotonic()
    os.kill(two[1].pid, signal.SIGTERM)
    (out, _), _ = [ends(process, 0) for process in two]
    assert time.monotonic() - sent < 30
    stopped = int(out.partition("stopped and saved at step ")[2].split()[0])

    epochs = stopped // 22 + 2
    two = [start(number, TRAIN, *flags, f"--config.epochs={epochs}") for number in range(2)]
    (out, _), _ = [ends(process, 0) for process in two]
    assert f"going on from step {stopped}" in out
    assert f"done: {22 * epochs} steps" in out
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(steps) and steps[-1] == 22 * epochs
    assert set(steps) >= set(range(11, 22 * epochs, 11))


def test_many_differences_are_named_shortly():
    facts = [{"seed": number % 2} for number in range(12)]
    assert differences(facts) == [
        "seed is 0 in processes 0, 2, 4, 6 and 2 more and 1 in processes 1, 3, 5, 7 and 2 more"
    ]
