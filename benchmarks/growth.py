"""How the cost of a training step grows with batch, size, channels and length.

    python benchmarks/growth.py      # writes a section of docs/performance.md

A power is fitted to each series: seconds, and bytes of temporary memory, as `(what grows)^power`.
Work grows with the power that is said beside it. The network is that for CIFAR-10 without its last
two blocks, and, for lengths, one block of 12 channels whose operator is `convolution`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing
from flax import nnx

from terminator_jax.models import Terminator, TerminatorConfig


class Series(NamedTuple):
    """Networks that differ in one thing.

    Attributes:
      grows: what that is.
      expected: the power of it that the number of products in the fast network grows with.
      values: of it.
      network: from a value to the network's shape and the batch.
    """

    grows: str
    expected: str
    values: Sequence[int]
    network: Callable[[int], tuple[TerminatorConfig, int]]


def pictures(**changes) -> TerminatorConfig:
    """The network for CIFAR-10 without its last two blocks."""
    three = dict(
        factors=(4, 3, 2), skips=((), (), (0,)), dropout=(0.0, 0.05, 0.05), global_layers=(3, 2, 2)
    )
    return TerminatorConfig.cifar(**three | changes)


def sequences(length: int) -> TerminatorConfig:
    """One block on sequences."""
    one = dict(factors=(4,), skips=((),), dropout=(0.0,), global_layers=(2,))
    return TerminatorConfig.scifar(size=(length,), channels=3, **one)


SERIES = [
    Series("batch", "1", (1, 8, 32, 128), lambda n: (pictures(), n)),
    # Products with channels grow with the square, those of two maps with the cube.
    Series("rows and columns", "2 to 3", (16, 32, 64), lambda n: (pictures(size=(n, n)), 8)),
    # Products of channels with channels grow with the square, all else with the channels.
    Series("channels × ", "1 to 2", (1, 2, 4), lambda n: (pictures(factors=(4 * n, 3, 2)), 8)),
    Series("length", "1", tuple(4**p for p in range(4, 9)), lambda n: (sequences(n), 4)),
]


def measure(config: TerminatorConfig, batch: int) -> tuple[float, int]:
    """Seconds and bytes of temporary memory of the logits and their gradients."""
    model = Terminator(config, rngs=nnx.Rngs(0))
    graph, params, other = nnx.split(model, nnx.Param, ...)
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(batch, *config.size, config.channels)), jnp.float32
    )

    def loss(params, x):
        return jnp.mean(nnx.merge(graph, params, other, copy=True)(x) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    call = {"step": lambda: jax.block_until_ready(compiled(params, x))}
    seconds = timing.medians(call, repeats=9, seconds=5)["step"]
    return seconds, compiled.memory_analysis().temp_size_in_bytes


def rows() -> Iterator[list[str]]:
    """A row for each series."""
    for series in SERIES:
        found = [measure(*series.network(value)) for value in series.values]
        seconds, sizes = zip(*found, strict=True)
        print(series.grows, series.values, seconds, sizes, flush=True)
        yield [
            series.grows,
            ", ".join(f"{value:,}" for value in series.values),
            ", ".join(f"{s * 1e3:.3g}" for s in seconds),
            f"{power(series.values, seconds):.2f}",
            ", ".join(f"{size / 1e6:.0f}" for size in sizes),
            f"{power(series.values, sizes):.2f}",
            series.expected,
        ]


def power(values: Sequence[float], results: Sequence[float]) -> float:
    """The power of `values` that fits `results` best."""
    return float(np.polyfit([math.log(v) for v in values], [math.log(r) for r in results], 1)[0])


def main() -> None:
    """Measures, prints and writes."""
    head = ["what grows", "", "ms", "power", "temporary MB", "power", "power of the work"]
    parts = [report.conditions("python benchmarks/growth.py"), report.table(head, list(rows()))]
    report.write_section("growth", "\n\n".join(parts))


if __name__ == "__main__":
    main()
