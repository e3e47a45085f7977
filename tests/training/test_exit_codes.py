"""What a command prints and returns when something goes wrong."""

import errno
import os
import subprocess
import sys
import types

import pytest

from terminator_jax.errors import InputError, SystemFailure
from terminator_jax.training import cli


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


@pytest.mark.parametrize(("before", "after"), [(None, "9"), ("1", "9"), ("3", "9"), ("0", "0")])
def test_a_log_level_that_the_user_chose_stays(before, after, monkeypatch):
    """JAX sets 1 by itself, which children of a notebook or a test inherit."""
    monkeypatch.delenv(cli.LOG_LEVEL, raising=False)
    if before:
        monkeypatch.setenv(cli.LOG_LEVEL, before)
    cli.hide_jaxlib_log(cli.NOTHING)
    assert os.environ[cli.LOG_LEVEL] == after


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
