"""What all tests share: strict settings, float64 where a test asks for it, several devices."""

import atexit
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

# Where a script runs `make test &`, the shell lets it ignore Ctrl-C, and the commands that tests
# start would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before JAX is imported: a broadcast between arrays of different rank must be written out.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# One cache of compiled programs for all processes of a test run: many compile the same ones.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="terminator-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest
from absl import flags
from nets import without_optimizations

REPOSITORY = Path(__file__).parent

# grain's worker processes read absl flags, which only a command parses.
flags.FLAGS.mark_as_parsed()

hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


@pytest.fixture
def unoptimized():
    """Compiles without optimizations, which is faster, for tests of what is computed."""
    with without_optimizations():
        yield


@pytest.fixture(autouse=True)
def _doctests_compile_quickly(request):
    """An example shows what is computed."""
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("unoptimized")


@pytest.fixture
def x64(unoptimized):
    """Float64 in this test: `def test_x(x64)` or `pytestmark = pytest.mark.usefixtures("x64")`.

    Unoptimized, since float64 is there to check formulas, and jaxlib 0.10.2 miscompiles
    `jnp.concatenate([a + b, -(c + d)], -1)` of five float64 columns on some CPUs.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def run_python():
    """Runs a piece of Python in a fresh process on `devices` virtual CPU devices.

    It fails the test with the process's output if the process fails, and returns its stdout.
    """

    def run(
        code: str,
        *,
        devices: int = 1,
        x64: bool = False,
        optimize: bool = True,
        timeout: float = 600,
    ) -> str:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(x64),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimize),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        }
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            env=os.environ | settings, cwd=REPOSITORY, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"process ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command in this process: exit code, stdout and stderr."""
    from terminator_jax.training import cli

    def run(module, *arguments):
        main = importlib.import_module(f"terminator_jax.{module}").main
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command replaces
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, *capsys.readouterr()

    return run
