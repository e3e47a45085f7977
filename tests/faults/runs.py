"""Starts trainings of a small model in processes of their own, for the scripts of this folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SMALL = REPOSITORY / "tests" / "training" / "small.py"


def environment(cache: Path) -> dict[str, str]:
    """Returns the environment of a training on one CPU device, with a cache of programs."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }


def command(workdir: Path, *fields: str, patch: str = "", config: Path = SMALL) -> list[str]:
    """Returns the command line of a training.

    Args:
        workdir: the directory of the run.
        fields: as `epochs=3`.
        patch: Python to run before.
        config: the experiment.
    """
    code = f"{patch}\nfrom terminator_jax import train\ntrain.cli.run(train.main, is_service=True)"
    start = ["-c", code] if patch else ["-m", "terminator_jax.train"]
    flags = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{f}" for f in fields)]
    return [sys.executable, *start, *flags]


def train(
    cache: Path, workdir: Path, *fields: str, timeout: float = 300, **options
) -> subprocess.CompletedProcess:
    """Trains to the end; see `command`."""
    return subprocess.run(
        command(workdir, *fields, **options), env=environment(cache), timeout=timeout,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


def content(workdir: Path) -> dict[str, bytes]:
    """Returns the bytes of the last checkpoint's arrays and of the model, by name."""
    import numpy as np
    import orbax.checkpoint as ocp
    import safetensors.numpy

    step = steps(workdir)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir.resolve() / "checkpoints" / str(step) / "state")
    import jax

    leaves, _ = jax.tree.flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    model = safetensors.numpy.load_file(workdir / "model.safetensors")
    return {"step": str(step).encode(), **arrays} | {k: v.tobytes() for k, v in model.items()}


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the checkpoints that have their names, sorted."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def last_line(done: subprocess.CompletedProcess) -> str:
    """Returns the last line on standard error, or else of the output."""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def is_traceback(done: subprocess.CompletedProcess) -> bool:
    """Returns whether a process printed a traceback of Python or a stack of C++."""
    return "Traceback (most recent" in done.stderr or "*** Check failure stack" in done.stderr


def cut_zip(path: Path) -> None:
    """Flips a byte amid the content of an archive's first member."""
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[0]
    data = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(data[member.header_offset + n :][:2], "little") for n in (26, 28))
    content = member.header_offset + 30 + name + extra
    data[content + member.compress_size // 2] ^= 255
    path.write_bytes(data)
