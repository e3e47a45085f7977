"""The CIFAR network for inference: baked beside not baked, at batches of 1 and 32.

python benchmarks/inference.py            # writes a section of docs/performance.md
python benchmarks/inference.py --quick    # the digits only, writes nothing
"""

import argparse
import functools
import time

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
        "values", "logits differ by")  # fmt: skip


def models(variant: str) -> tuple[Terminator, Terminator, tuple[int, ...]]:
    """Returns a network with running averages, the same one baked, and the shape of a picture."""
    config = getattr(TerminatorConfig, variant)()
    model = nnx.jit(lambda: Terminator(config, rngs=nnx.Rngs(0)))()
    shape = (*config.size, config.channels)
    pictures = np.random.default_rng(0).normal(size=(32, *shape))
    terminator_jax.calibrate(model, [jnp.asarray(pictures, jnp.float32)])
    return model, model.bake(), shape


def measure(variant: str) -> list[list[str]]:
    """Returns a row for each model and batch."""
    model, baked, shape = models(variant)
    rows = []
    for batch in BATCHES:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, *shape)), jnp.float32)
        calls, compiling, logits, values = {}, {}, {}, {}
        for name, net in (("model", model), ("baked", baked)):
            graph, state = nnx.split(net)
            values[name] = sum(a.size for a in jax.tree.leaves(state))
            start = time.perf_counter()
            function = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x))
            program = function.lower(state, x).compile()
            compiling[name] = time.perf_counter() - start
            calls[name] = functools.partial(_run, program, state, x)
            logits[name] = np.asarray(program(state, x))
        times = timing.medians(calls, repeats=15, seconds=10)
        difference = np.abs(logits["baked"] - logits["model"]).max()
        for name, call in calls.items():
            ratio = f"{times['baked'] / times['model']:.2f}" if name == "baked" else ""
            rows.append([
                variant, str(batch), name, f"{compiling[name]:.1f}", f"{1e3 * times[name]:.1f}",
                ratio, f"{timing.peak_bytes(call) / 1e6:.0f}", f"{values[name]:,}",
                f"{difference:.1e}" if name == "baked" else "",
            ])  # fmt: skip
            print(*rows[-1], sep="  ", flush=True)
    return rows


def _run(program, state, x):
    jax.block_until_ready(program(state, x))


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the digits only, writes nothing")
    quick = parser.parse_args().quick
    rows = measure("digits" if quick else "cifar")
    if not quick:
        text = report.conditions("python benchmarks/inference.py") + "\n\n"
        report.write_section("inference", text + report.table(HEAD, rows))


if __name__ == "__main__":
    main()
