"""What a command prints and returns when something goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from terminator_jax.errors import InputError, SystemFailure
from terminator_jax.training import cli
from terminator_jax.training.checkpoint import latest_step


def run(error, capsys, extra=""):
    def command(arguments):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(command, extra=extra)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such thing"), 2, "error: no such thing\n"),
        (SystemFailure("no room"), 1, "error: no room\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 1, "error: a: No such file\n"),
        (OSError("strange"), 1, "error: strange\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (MemoryError(), 1, "error: not enough memory: allocate less, such as a smaller batch\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nmore"),
            1,
            "error: not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\n",
        ),
        (
            RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 4"),
            1,
            "error: not enough memory: INTERNAL: Error dispatching computation: Out of memory "
            "allocating 4\n",
        ),
    ],
)
def test_one_line_and_a_code(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_silence", lambda stream: None)
    assert run(error, capsys) == (code, line)


def test_errors_in_the_background_are_hidden(monkeypatch):
    """Those of C come without an object and a message, as by `PyErr_WriteUnraisable(NULL)`."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for _ in range(2000):  # as commands that one process calls: it must not nest
        cli.hide_background_errors()

    async def read():
        """Reads nothing."""

    coroutine = read()
    objects = [None, coroutine, print]
    for found in objects:
        unraisable = types.SimpleNamespace(object=found, err_msg=None, exc_value=RuntimeError())
        sys.unraisablehook(unraisable)
    coroutine.close()
    assert [unraisable.object for unraisable in seen] == [print]


def test_a_flag_without_a_value(run_main):
    last = ["--workdir=--"]  # which Python 3.13 takes for a directory
    for words in (["--workdir", "--"], ["--workdir"], *[last] * (sys.version_info < (3, 13))):
        code, _, err = run_main("train", "--config=digits", *words)
        assert (code, err.count("\n")) == (2, 1) and "expected one argument" in err


def test_a_missing_package_is_named_with_its_extra(capsys):
    error = ModuleNotFoundError("No module named 'onnx'", name="onnx.helper")
    hint = "error: onnx is not installed: pip install 'terminator-jax[onnx]'\n"
    assert run(error, capsys, extra="onnx") == (1, hint)


def test_a_bug_keeps_its_traceback(capsys):
    def command(arguments):
        error = ZeroDivisionError("division by zero")
        error.add_note("the log is runs/a/log.jsonl")
        raise error

    with pytest.raises(ZeroDivisionError):
        cli.run(command)
    line = capsys.readouterr().err
    assert line.startswith("error: this is a bug") and "; the log is runs/a/log.jsonl\n" in line


def test_names_that_the_terminal_cannot_show():
    program = r"from terminator_jax.training import cli; cli.run(lambda _: print('\u65e5 \udce9'))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, rb"\u65e5 \udce9" + b"\n", b"")


@pytest.mark.parametrize(("output", "code"), [("/dev/full", 1), ("/dev/null", 0)])
def test_output_that_cannot_be_written(output, code):
    program = "from terminator_jax.training import cli\ncli.run(lambda a: print('x' * 9) or 0)"
    with open(output, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    said = "error: No space left on device\n" if code else ""
    assert (done.returncode, done.stderr) == (code, said)


# A service that a signal asks to end, first by one that is ignored.
ASKED = """
import os, signal, sys
from terminator_jax.training import cli
signal.signal(signal.SIGHUP, signal.SIG_IGN)

def main(arguments):
    print(os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev, flush=True)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.{name})
    raise ValueError("not ended")

cli.run(main, is_service={service})
"""


@pytest.mark.parametrize(
    ("name", "service", "code"),
    [("SIGTERM", True, 0), ("SIGUSR1", True, 0), ("SIGINT", True, 130), ("SIGINT", False, 130)],
)
def test_a_signal_before_there_is_anything_to_save(name, service, code):
    """Also as process 1 of a container, which ignores signals without a handler; no stdout."""
    alone = ["unshare", "--fork", "--pid"]
    may = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    program = ASKED.format(name=name, service=service)
    command = [*(alone if may else []), sys.executable, "-c", program]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (code, "" if code == 0 else "interrupted\n")


def test_a_service_goes_on_without_a_terminal():
    program = (
        "import sys, warnings\nfrom terminator_jax.training import cli\n"
        "def main(_):\n    print('x' * 9, flush=True)\n    print('y', file=sys.stderr)\n"
        "    print('x')\n    warnings.warn('z')\n    return 3\n"
        "cli.run(main, is_service=True)"
    )
    for ending in (">/dev/full 2>/dev/full", ">&- 2>&- <&-", "2>&1 | true; exit $PIPESTATUS"):
        line = f'"$0" -c "$1" {ending}'
        done = subprocess.run(["bash", "-c", line, sys.executable, program], check=False)
        assert done.returncode == 3, ending


# The terminal that is standard input becomes the one that controls the process.
ON_A_TERMINAL = """
import fcntl, os, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from terminator_jax import train
train.cli.run(train.main, is_service=True)
"""


def test_a_terminal_that_closes_loses_no_step(command, tmp_path):
    """On a real one, with a bar."""
    ours, theirs = os.openpty()
    flags = ["--config=tests/training/small.py", f"--workdir={tmp_path}", "--config.epochs=9999"]
    flags += ["--config.checkpoint_every_steps=0", "--config.log_every_steps=5"]
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *flags],
        env=command.env, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        os.read(ours, 2**16)
        time.sleep(0.01)
    os.close(ours)
    assert process.wait(60) == 0
    assert latest_step(tmp_path) == json.loads(log.read_text().splitlines()[-1])["step"]


def test_a_train_on_a_full_output_saves(command, tmp_path):
    flags = ["--config=tests/training/small.py", f"--workdir={tmp_path}", "--config.epochs=9999"]
    flags += ["--config.checkpoint_every_steps=0"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "terminator_jax.train", *flags],
            env=command.env, stdout=full, stderr=full,
        )  # fmt: skip
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert latest_step(tmp_path) == json.loads(log.read_text().splitlines()[-1])["step"]
