"""Programs kept on disk: found again by another process, and only where they are the same."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terminator_jax.training import programs
from terminator_jax.training.programs import kept

# Where this is run first, no step can be traced.
UNTRACEABLE = """
from terminator_jax.training import task

def loss(*arguments):
    raise RuntimeError("traced")

task.Task.loss = loss
"""


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("parallel", "devices"), [("pmap", 1), ("pmap", 4), ("jit", 4)])
def test_a_second_start_trains_without_tracing(make_command, tmp_path, parallel, devices):
    command = make_command(devices, XDG_CACHE_HOME=str(tmp_path / "cache"))
    command.train(tmp_path / "first", f"parallel={parallel}")

    def again(name, *fields):
        fields = [f"parallel={parallel}", *fields]
        process = command.patched(UNTRACEABLE, *fields, workdir=tmp_path / name)
        _, err = process.communicate(timeout=300)
        return process.returncode, err

    assert again("second") == (0, "")
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    code, err = again("other", "optimizer.learning_rate=0.004")
    assert code == 1
    assert "RuntimeError: traced" in err


class Doubling:
    """`kept` with a function that counts how often it is traced and compiled."""

    def __init__(self, folder):
        self.folder, self.traced = folder, 0

    def __call__(self, x, made_from="double", factor=2):
        @jax.jit
        def function(x):
            self.traced += 1
            return factor * x

        return np.asarray(kept(function, made_from, self.folder, jax.devices()[:1])(x))

    def files(self):
        found = {".origin": set(), ".program": set()}
        for file in self.folder.iterdir():
            found[file.suffix].add(file)
        return found[".origin"], found[".program"]


@pytest.fixture
def double(tmp_path):
    return Doubling(tmp_path)


def test_is_traced_once_for_each_set_of_shapes_and_origin(double):
    x = jnp.arange(3.0)
    for _ in range(3):
        np.testing.assert_array_equal(double(x), [0, 2, 4])
    assert double.traced == 1
    np.testing.assert_array_equal(double(jnp.arange(4.0)), [0, 2, 4, 6])
    np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
    np.testing.assert_array_equal(double(x, "triple", factor=3), [0, 3, 6])
    assert double.traced == 4


def test_other_shapes_of_an_origin_are_not_compiled_twice(double):
    short, long, written = jnp.arange(3.0), jnp.arange(4.0), {}
    for n, x in enumerate((short, long, short, short), start=1):
        np.testing.assert_array_equal(double(x), 2 * x)
        origins, compiled = double.files()
        assert (double.traced, len(origins), len(compiled)) == (min(n, 3), 1, min(n, 2))
        for file in compiled:
            assert written.setdefault(file, file.stat().st_ino) == file.stat().st_ino


def test_a_program_is_loaded_before_it_is_called(double):
    x = jnp.arange(3.0)
    double(x)
    _, [program] = double.files()
    os.utime(program, (0, 0))
    early = kept(jax.jit(lambda x: 1 / 0), "double", double.folder, jax.devices()[:1])
    deadline = time.monotonic() + 60
    while program.stat().st_mtime == 0 and time.monotonic() < deadline:  # it is the last touched
        time.sleep(0.01)
    program.unlink()
    np.testing.assert_array_equal(early(x), [0, 2, 4])


def test_one_program_of_two_origins_is_compiled_once(double):
    x = jnp.arange(3.0)
    double(x, "first")
    double(x, "second")
    origins, compiled = double.files()
    assert (double.traced, len(origins), len(compiled)) == (2, 2, 1)


def test_changed_sources_are_another_origin(double, monkeypatch, tmp_path_factory):
    sources = tmp_path_factory.mktemp("sources")
    (sources / "module.py").write_text("FACTOR = 2")
    monkeypatch.setattr(programs, "PACKAGE", sources)
    x = jnp.arange(3.0)
    double(x)
    (sources / "module.py").write_text("FACTOR = 3")
    np.testing.assert_array_equal(double(x, factor=3), [0, 3, 6])
    assert double.traced == 2


def test_a_broken_file_is_made_again(double):
    x = jnp.arange(3.0)
    double(x)
    for content in (b"", b"no program"):
        [origin], [program] = double.files()
        for file in (program, origin):
            file.write_bytes(content)
            np.testing.assert_array_equal(double(x), [0, 2, 4])
    assert double.traced == 5
    double(x)
    assert double.traced == 5


def test_the_oldest_files_go_first(double, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 4)
    x = jnp.arange(3.0)
    for n in range(3):
        double(x, n, factor=n)
        for file in double.folder.iterdir():
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    assert len(list(double.folder.iterdir())) == 4
    double(x, 2, factor=2)
    double(x, 1, factor=1)
    assert double.traced == 3
    double(x, 0, factor=0)
    assert double.traced == 4


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    double = Doubling(tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="not written"):
        np.testing.assert_array_equal(double(jnp.arange(3.0)), [0, 2, 4])
