"""JAX's own environment variables mean for the commands what they mean for every program."""

import numpy as np
import pytest

SMALL = "tests/training/small.py"


def train(make_command, workdir, *fields, **env):
    flags = [f"--config.{field}" for field in ("epochs=2", *fields)]
    command = make_command(**env)
    out, _ = command.run("train", f"--config={SMALL}", f"--workdir={workdir}", *flags)
    return out


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_NUMPY_DTYPE_PROMOTION", "strict"), ("JAX_DEBUG_NANS", "1"), ("JAX_ENABLE_X64", "1")],
)
def test_a_run_with(make_command, tmp_path, name, value):
    assert "done: 44 steps" in train(make_command, tmp_path, **{name: value})


def test_a_run_without_jit(make_command, tmp_path):
    """By `jit`: JAX compiles every operation of a `pmap` anew where it may not compile it whole."""
    fields = ["parallel=jit", "batch_size=718", "eval_batch_size=360"]
    assert "done: 4 steps" in train(make_command, tmp_path, *fields, JAX_DISABLE_JIT="1")


def test_the_cache_goes_where_jax_is_told(make_command, tmp_path):
    caches = {name: tmp_path / name for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")}
    env = {name: str(folder) for name, folder in caches.items()}
    train(make_command, tmp_path / "run", "compilation_cache=True", **env)
    assert list(caches["JAX_COMPILATION_CACHE_DIR"].iterdir())
    assert not (caches["XDG_CACHE_HOME"] / "terminator_jax" / "xla").exists()


def test_the_cache_is_off_where_jax_is_told(make_command, tmp_path, monkeypatch):
    """Without `JAX_COMPILATION_CACHE_DIR` it is in the user's cache directory, if it is on."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache = tmp_path / "cache" / "terminator_jax" / "xla"
    for on in (False, True):
        env = {"JAX_ENABLE_COMPILATION_CACHE": str(on), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        train(make_command, tmp_path / f"run {on}", "compilation_cache=True", **env)
        assert (cache.exists() and any(cache.iterdir())) == on


def test_a_platform_that_is_not_there(make_command, tmp_path):
    command = make_command(JAX_PLATFORMS="cuda")
    flags = [f"--config={SMALL}", f"--workdir={tmp_path / 'run'}"]
    _, err = command.run("train", *flags, code=2)
    assert err.count("\n") == 1 and "JAX_PLATFORMS" in err


def test_a_locale_that_knows_ascii_only(make_command, tmp_path):
    """Files are UTF-8; the terminal shows codes."""
    command = make_command(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    labels, file = np.arange(128) % 2, tmp_path / "café.npz"
    pictures = np.repeat(255 * labels, 64).reshape(-1, 8, 8, 1).astype(np.uint8)
    np.savez(file, image=pictures, label=labels, classes=["naïve", "日本"])
    workdir, fields = tmp_path / "run", [f"data.name={file}", "model.options.num_classes=2"]
    command.train(workdir, *fields, "batch_size=32", "eval_batch_size=12")
    card = (workdir / "README.md").read_text(encoding="utf-8")
    assert f"--config.data.name={file}" in card and "naïve, 日本" in card
    out, _ = command.run("evaluate", f"--workdir={workdir}")
    assert r"na\xefve" in out and r"\u65e5\u672c" in out
    flags = ["--config=digits", f"--workdir={tmp_path / 'caffè'}"]
    _, err = command.run("train", *flags, code=2)
    assert err.count("\n") == 1 and "set PYTHONUTF8=1" in err
