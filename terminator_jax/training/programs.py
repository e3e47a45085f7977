"""Compiled programs on disk, found by what they are made from.

JAX keeps compiled programs too, but finds them by the program, and so has to trace and lower a
function first: two seconds of Python for a small network's training step, five for a large one's.

folder/<digest of what a program is made from>.origin   the program's name, its arguments' shapes
folder/<digest of the program>.program                  the program, compiled
"""

import hashlib
import os
import pickle
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Files in the folder; the oldest go first.
KEPT = 40
PACKAGE = Path(__file__).parent.parent
# Lines of /proc/cpuinfo that tell one kind of processor from another.
PROCESSOR = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def kept(
    function: Callable, made_from: Any, folder: Path, devices: Sequence[jax.Device]
) -> Callable:
    """`function` for arguments of one set of shapes, compiled once for all processes to come.

    A program that is there is loaded at once, beside whatever else goes on until the first call.

    Args:
        function: of `jax.jit` or `jax.pmap`; the results of a call can be arguments of the next.
        made_from: what `function` depends on besides the arguments' shapes, the package's sources,
            the versions of JAX and the machine. Its `repr` has to tell one from another. A
            program for other shapes than the last time is traced anew.
        folder: where programs are kept. Whoever can write to it can run code here.
        devices: those that `function` runs on.

    Returns:
        A function that compiles the program when it is called first, if there is none.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> double = kept(jax.jit(lambda x: 2 * x), "double", folder, jax.devices()[:1])
        >>> print(double(jax.numpy.arange(3)))
        [0 2 4]
    """
    machine = repr(_machine(devices))
    origin = folder / f"{_digest(machine, _sources(), repr(made_from))}.origin"
    executor = ThreadPoolExecutor(1)
    early = executor.submit(_load, origin, devices)
    executor.shutdown(wait=False)
    programs: list[Callable] = []

    def call(*arguments: Any) -> Any:
        if not programs:
            shapes = _shapes(arguments)
            there = early.result()
            if there is None or there.shapes != shapes:
                there = _made(function.lower(*arguments), shapes, origin, machine, devices)
            programs.append(there.program)
        return programs[0](*arguments)

    return call


class _Kept(NamedTuple):
    """A program and, as text, its arguments' shapes."""

    program: Callable
    shapes: str


def _shapes(arguments: tuple) -> str:
    return repr(jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "sharding", None)), arguments))


def _made(
    lowered: jax.stages.Lowered,
    shapes: str,
    origin: Path,
    machine: str,
    devices: Sequence[jax.Device],
) -> _Kept:
    """The program of an origin: another's, if that is the same, or else compiled and kept."""
    name = _digest(machine, lowered.as_text(), repr((lowered.in_tree, lowered.out_tree)))
    _write(origin, lambda: f"{name}\n{shapes}".encode())
    there = _load(origin, devices)
    if there is None:
        with _uncached():
            there = _Kept(lowered.compile(), shapes)
        _write(origin.with_name(f"{name}.program"), lambda: _serialized(there.program))
    return there


def _load(origin: Path, devices: Sequence[jax.Device]) -> _Kept | None:
    """The program of an origin, if it is there and whole."""
    try:
        name, shapes = origin.read_text().split("\n", 1)
        program = origin.with_name(f"{name}.program")
        found = serialize_executable.deserialize_and_load(
            *pickle.loads(program.read_bytes()), execution_devices=devices
        )
        for file in (origin, program):
            os.utime(file)
    except Exception:  # whatever is wrong with a file, it can be made again
        return None
    return _Kept(found, shapes)


def _serialized(compiled: jax.stages.Compiled) -> bytes:
    """The content of a program's file."""
    # What the compiler called, such as rules of partitioning: kept along, and of no use any more.
    compiled._executable._unloaded_executable.keepalive = None
    return pickle.dumps(serialize_executable.serialize(compiled))


def _write(path: Path, content: Callable[[], bytes]) -> None:
    """Writes a file whole or not at all, and removes the oldest where there are too many."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(content())
        os.replace(new, path)
        for old in sorted(path.parent.iterdir(), key=lambda file: -file.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)
    except Exception as error:  # a full disk, a device whose programs cannot be written down
        warnings.warn(
            f"the next start will compile again: {path} not written: {error}", stacklevel=2
        )


@contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's own cache: on CPUs, what came from there cannot be written down again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _sources() -> str:
    """All of the package's code."""
    return "\0".join(path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py")))


def _machine(devices: Sequence[jax.Device]) -> list:
    """The devices, what runs on them and how JAX is set."""
    client = devices[0].client
    return [
        [(device.id, device.device_kind) for device in devices],
        [client.platform, client.platform_version, _processor()],
        [sys.version, *(module.__version__ for module in (jax, jaxlib, flax, optax))],
        [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        sorted(jax.config.values.items(), key=str),
    ]


def _processor() -> list[str]:
    """What the processor can do, as far as the system tells: programs for CPUs are for one kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [platform.machine(), *sorted({x for x in lines if x.startswith(PROCESSOR)})]
