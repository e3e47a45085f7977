"""What the tests of the training application share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from terminator_jax.training import config as configs
from terminator_jax.training import tasks

REPOSITORY = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache directory of the tests' own: digits and compiled programs are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Command:
    """`python -m terminator_jax.MODULE` in a process of its own, warnings being errors."""

    def __init__(self, devices=1, **env):
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Compile in half the time, and each program once for all tests.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(REPOSITORY),
            **env,
        }

    def start(self, module, *arguments):
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", f"terminator_jax.{module}", *map(str, arguments)],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def patched(self, patch, *fields, workdir):
        """Starts a training of the tiny network after a piece of code that patches the package."""
        flags = [f"--config={TINY}", f"--workdir={workdir}", *(f"--config.{f}" for f in fields)]
        code = (
            f"{patch}\nfrom terminator_jax import train\ntrain.cli.run(train.main, is_service=True)"
        )
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *flags],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, module, *arguments, code=0):
        """stdout and stderr of a command that ends with this exit code."""
        process = self.start(module, *arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{out}{err}"
        return out, err

    def train(self, workdir, *fields, code=0, config=TINY):
        """Trains the tiny network with these fields changed."""
        flags = [f"--config.{field}" for field in fields]
        return self.run("train", f"--config={config}", f"--workdir={workdir}", *flags, code=code)


@pytest.fixture(scope="session")
def command():
    return Command()


@pytest.fixture(scope="session")
def make_command():
    return Command


@pytest.fixture
def make(monkeypatch):
    """The configuration of the small model with fields and options changed."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))

    def make(*fields, **options):
        config = configs.read("tests/training/small.py")
        with config.unlocked():
            config.model.options = options
        return configs.override(config, [f"--config.{field}" for field in fields])

    return make


@pytest.fixture(autouse=True)
def _compiles_quickly(request):
    """What is tested here is the trainer; optimized programs are tested where they are written."""
    if "optimized" not in request.keywords:
        request.getfixturevalue("unoptimized")
