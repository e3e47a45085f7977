"""Networks of digits and of CIFAR for inference: baked beside not baked, at batches of 1 and 32.

python benchmarks/inference.py            # writes a section of docs/performance.md
python benchmarks/inference.py --quick    # the digits only, writes nothing
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing
from flax import nnx

import terminator_jax
from terminator_jax.models import Terminator, TerminatorConfig

BATCHES = (1, 32)
HEAD = ("network", "batch", "model", "compile s", "ms", "baked / model", "MB at its peak",
        "values", "GFLOP", "logits differ by")  # fmt: skip


def models(variant: str) -> tuple[Terminator, Terminator, tuple[int, ...]]:
    """Returns a network with running averages, the same one baked, and the shape of a picture."""
    config = getattr(TerminatorConfig, variant)()
    model = nnx.jit(lambda: Terminator(config, rngs=nnx.Rngs(0)))()
    shape = (*config.size, config.channels)
    pictures = np.random.default_rng(0).normal(size=(32, *shape))
    terminator_jax.calibrate(model, [jnp.asarray(pictures, jnp.float32)])
    return model, model.bake(), shape


class Measured(NamedTuple):
    """A model for one batch: its call, what compiling took, and what it gives."""

    call: Callable[[], object]
    compiling: float  # seconds
    operations: float  # of floating point, as XLA counts them
    values: int  # numbers in the model
    logits: np.ndarray


def compiled(model: nnx.Module, x: jax.Array) -> Measured:
    """Compiles a model for a batch."""
    graph, state = nnx.split(model)
    start = time.perf_counter()
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    return Measured(
        call=lambda: jax.block_until_ready(program(state, x)),
        compiling=time.perf_counter() - start,
        operations=program.cost_analysis()["flops"],
        values=sum(array.size for array in jax.tree.leaves(state)),
        logits=np.asarray(program(state, x)),
    )


def measure(variant: str) -> list[list[str]]:
    """Returns a row for each model and batch."""
    model, baked, shape = models(variant)
    rows = []
    for batch in BATCHES:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, *shape)), jnp.float32)
        both = {"model": compiled(model, x), "baked": compiled(baked, x)}
        calls = {name: found.call for name, found in both.items()}
        times = timing.medians(calls, repeats=15, seconds=10)
        difference = np.abs(both["baked"].logits - both["model"].logits).max()
        ratio = times["baked"] / times["model"]
        for name, found in both.items():
            beside = (f"{ratio:.2f}", f"{difference:.1e}") if name == "baked" else ("", "")
            rows.append([
                variant, str(batch), name, f"{found.compiling:.1f}", f"{1e3 * times[name]:.1f}",
                beside[0], f"{timing.peak_bytes(found.call) / 1e6:.0f}", f"{found.values:,}",
                f"{found.operations / 1e9:.2f}", beside[1],
            ])  # fmt: skip
            print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the digits only, writes nothing")
    quick = parser.parse_args().quick
    rows = measure("digits")
    if not quick:
        rows += measure("cifar")
        text = report.conditions("python benchmarks/inference.py") + "\n\n"
        report.write_section("inference", text + report.table(HEAD, rows))


if __name__ == "__main__":
    main()
