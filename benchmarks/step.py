"""Training steps and forward passes: time, memory, compilation, share of the machine's rate.

    python benchmarks/step.py            # writes a section of docs/performance.md
    python benchmarks/step.py --quick    # the digits only, writes nothing

Every case compiles twice: once without and once with what JAX's persistent cache then holds. Beside
each case, in the same run, stands a product of two 2048×2048 float32 matrices, which tells what the
machine does at that moment: the share of it is the fast network's products, counted by hand, over
the time of the step.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing

from terminator_jax.layers import sfne
from terminator_jax.models import MODELS, Terminator
from terminator_jax.training import config as configs
from terminator_jax.training.optimizer import make_optimizer
from terminator_jax.training.state import new_state, split_model
from terminator_jax.training.step import make_train_step
from terminator_jax.training.tasks import make_task

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# Of the products in one picture's way through the fast network, there and, with gradients, back.
GFLOP = {"cifar10": {"forward": 2.2, "step": 6.6}}
SIDE = 2048


class Case(NamedTuple):
    """One program.

    Attributes:
      experiment: name of the file.
      what: `step` or `forward`.
      batch: pictures.
      dtype: of the computation.
      remat: whether gradients compute again what they could keep.
      reference: whether blocks are computed as they are written down, one line a formula.
    """

    experiment: str
    what: str
    batch: int
    dtype: str = "float32"
    remat: bool = False
    reference: bool = False


CASES = [
    Case("digits", "step", 64),
    Case("mnist", "step", 64),
    Case("cifar10", "forward", 32),
    Case("cifar10", "step", 32),
    Case("cifar10", "forward", 32, "bfloat16"),
    Case("cifar10", "step", 32, "bfloat16"),
    Case("cifar10", "step", 32, remat=True),
    Case("cifar10", "step", 32, reference=True),
]


class Result(NamedTuple):
    """Seconds, bytes and what the machine did beside it in FLOP/s."""

    tracing: float
    cold: float
    cached: float
    temporary: int
    seconds: float
    rate: float


def program(case: Case) -> tuple[Callable, list]:
    """A function of arrays, and the arrays."""
    fields = [f"dtype={case.dtype}", f"batch_size={case.batch}", f"remat={case.remat}"]
    config = configs.read(
        EXPERIMENTS / f"{case.experiment}.py", [f"--config.{field}" for field in fields]
    )
    task = make_task(config)
    tx, schedule = make_optimizer(config, steps_per_epoch=100)
    model_def, params, model_state = split_model(task.make_model())
    state = new_state(params, model_state, tx, seed=0)
    size = (*task.model_config.size, task.model_config.channels)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (case.batch, *size), dtype=np.uint8)
    batch = {"image": pictures, "label": rng.integers(0, 10, case.batch, dtype=np.int32)}
    if case.what == "step":
        return make_train_step(task, model_def, tx, schedule), [state, batch]

    def forward(params, pictures):
        return model_def.merge(model_def.unravel(params), model_state)(task.inputs(pictures))

    return forward, [state.params, pictures]


def measure(case: Case) -> Result:
    """All numbers of one case."""
    function, arrays = program(case)

    def compiled():
        jax.clear_caches()
        before = time.perf_counter()
        lowered = jax.jit(function).lower(*arrays)
        between = time.perf_counter()
        return lowered.compile(), between - before, time.perf_counter() - between

    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        _, tracing, cold = compiled()
        call, _, cached = compiled()
        jax.config.update("jax_compilation_cache_dir", None)
    x = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    calls = {
        "step": lambda: jax.block_until_ready(call(*arrays)),
        "product": lambda: [product(x, x).block_until_ready() for _ in range(5)],
    }
    medians = timing.medians(calls, repeats=9, seconds=1e9)
    rate = 5 * 2 * SIDE**3 / medians["product"]
    temporary = call.memory_analysis().temp_size_in_bytes
    return Result(tracing, cold, cached, temporary, medians["step"], rate)


def plain_blocks() -> None:
    """Lets networks compute their blocks by the formula, with convolutions by FFT."""
    plain = functools.partial(Terminator, implementation="reference")
    MODELS["terminator"] = MODELS["terminator"]._replace(module=plain)
    sfne.REFERENCE_CONVOLUTION = "fft"


def line(case: Case, result: Result) -> list[str]:
    """A row of the table."""
    gflop = GFLOP.get(case.experiment, {}).get(case.what)
    share = f"{case.batch * gflop * 1e9 / result.seconds / result.rate:.0%}" if gflop else "–"
    marks = ["remat"] * case.remat + ["plain blocks"] * case.reference
    return [
        f"{case.experiment} {case.what}", str(case.batch), ", ".join([case.dtype, *marks]),
        f"{result.seconds:.3g}", f"{case.batch / result.seconds:.0f}",
        f"{result.rate / 1e9:.0f}", share, f"{result.temporary / 1e9:.2f}",
        f"{result.tracing:.1f}", f"{result.cold:.1f}", f"{result.cached:.1f}",
    ]  # fmt: skip


HEAD = [
    "program", "batch", "", "seconds", "pictures/s", "2048³ product, GFLOP/s", "share of it",
    "temporary GB", "tracing, s", "compiling, s", "… with the cache, s",
]  # fmt: skip


def seconds_to_first_step() -> list[float]:
    """From the shell to the first step of the digits, with an empty cache and a filled one.

    The second is the median of five starts.
    """
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for run in range(6):
            workdir = Path(directory) / str(run)
            command = [sys.executable, "-m", "terminator_jax.train"]
            flags = ["--config", str(EXPERIMENTS / "digits.py"), "--workdir", str(workdir)]
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, *flags, "--config.log_every_steps=1"],
                env={**os.environ, "XDG_CACHE_HOME": directory},
                stdout=subprocess.DEVNULL,
            )
            log = workdir / "log.jsonl"
            while not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            found.append(time.perf_counter() - start)
            process.kill()
            process.wait()
    return [found[0], statistics.median(found[1:])]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the digits only, writes nothing")
    parser.add_argument("--only", type=int, help="one case, by its number: prints its row")
    flags = parser.parse_args()
    if flags.only is not None:
        case = CASES[flags.only]
        if case.reference:
            plain_blocks()
        print(*line(case, measure(case)), sep="\t")
        return
    rows = []
    # A process for each, so that none finds the memory of another.
    for number in range(1 if flags.quick else len(CASES)):
        command = [sys.executable, __file__, "--only", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(done.stdout.strip().split("\t"))
        print(*rows[-1], sep=" | ", flush=True)
    cold, warm = seconds_to_first_step()
    text = (
        f"From the shell to the first step of `experiments/digits.py`: {cold:.1f} s, and"
        f" {warm:.1f} s (median of five) once the cache has the program."
    )
    print(text)
    if not flags.quick:
        parts = [report.conditions("python benchmarks/step.py"), report.table(HEAD, rows), text]
        report.write_section("step", "\n\n".join(parts))


if __name__ == "__main__":
    main()
