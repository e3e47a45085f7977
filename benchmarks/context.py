"""Ways to full context, and to some, as interchangeable layers on the same maps.

    python benchmarks/context.py     # writes a section of docs/performance.md and docs/context.svg

HyperZZW by its three operators, lambda layers and attention, global and local: time, peak memory
and parameters of one layer against the size of its map. Every layer gets the same arrays, in
float32.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import calls
import growth
import numpy as np
import report
import timing
from flax import nnx

from terminator_jax.layers import GlobalHyperZZW, LambdaLayer, LocalAttention2D

BATCH, CHANNELS, HEADS = 4, 64, 4
SIZES = (8, 16, 32, 64, 128)
REACH = 3  # positions to each side that a local context has
PLOT = Path(__file__).parent.parent / "docs" / "context.svg"


class WithItself(nnx.Module):
    """An operator on two maps, given one map twice."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, x)


def hyperzzw(operator: str) -> Callable[[int], nnx.Module]:
    """A slow network's kernel times the map, meeting the map by `operator`."""
    return lambda n: WithItself(
        GlobalHyperZZW((n, n), CHANNELS, operator=operator, rngs=nnx.Rngs(0))
    )


def lambdas(**context) -> Callable[[int], nnx.Module]:
    """A lambda layer; global without a `window`."""
    return lambda n: LambdaLayer(
        CHANNELS, CHANNELS, heads=HEADS, rngs=nnx.Rngs(0), **context or dict(size=(n, n))
    )


def attention(window: int | None) -> Callable[[int], nnx.Module]:
    """Attention with projections; global without a `window`."""
    return lambda n: LocalAttention2D(CHANNELS, window, heads=HEADS, rngs=nnx.Rngs(0))


class Way(NamedTuple):
    """A layer by the size of its map, up to the largest that takes seconds and not minutes."""

    make: Callable[[int], nnx.Module]
    largest: int = 128


WINDOW = 2 * REACH + 1
WAYS = {
    "HyperZZW `dot`": Way(hyperzzw("dot")),
    "HyperZZW `product`": Way(hyperzzw("product")),
    "HyperZZW `convolution`": Way(hyperzzw("convolution")),
    "lambda, global": Way(lambdas(), 64),
    "attention, global": Way(attention(None), 64),
    f"lambda, {WINDOW}×{WINDOW}": Way(lambdas(window=(WINDOW, WINDOW))),
    f"attention, {WINDOW}×{WINDOW}": Way(attention(REACH)),
}


class Cost(NamedTuple):
    """Of one layer: seconds and bytes, forward and with gradients, and how much it learns."""

    forward: float
    gradient: float
    forward_bytes: int
    gradient_bytes: int
    parameters: int


# What grows with a map, of a layer with gradients.
MEASURES = {"milliseconds": lambda c: c.gradient * 1e3, "MB": lambda c: c.gradient_bytes / 1e6}


def measure(n: int) -> dict[str, Cost]:
    """What each way costs on maps of n×n."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(BATCH, n, n, CHANNELS)).astype(np.float32) for _ in range(2))
    costs, built = {}, {}
    for name, way in WAYS.items():
        if n <= way.largest:
            layer = way.make(n)
            built[name] = calls.compiled(layer, x, dy), calls.parameters(layer)
    seconds = {
        kind: timing.medians({name: getattr(own, kind) for name, (own, _) in built.items()})
        for kind in calls.Calls._fields
    }
    for name, (own, parameters) in built.items():
        peaks = [timing.peak_bytes(call) for call in own]
        costs[name] = Cost(seconds["forward"][name], seconds["gradient"][name], *peaks, parameters)
        print(n, name, *costs[name], sep=" | ", flush=True)
    return costs


def row(name: str, found: dict[int, dict[str, Cost]], cells: Callable[[Cost], str]) -> list[str]:
    """A table's row: a cell for each size."""
    return [name, *(cells(costs[name]) if name in costs else "–" for costs in found.values())]


def tables(found: dict[int, dict[str, Cost]]) -> str:
    """Time, memory and parameters."""
    head = ["layer", *(f"{n}×{n}" for n in found)]
    kinds = {
        "Milliseconds forward / with all gradients:": lambda c: (
            f"{c.forward * 1e3:.3g} / {c.gradient * 1e3:.3g}"
        ),
        "Peak memory, MB, forward / with all gradients:": lambda c: (
            f"{c.forward_bytes / 1e6:.0f} / {c.gradient_bytes / 1e6:.0f}"
        ),
        "Parameters:": lambda c: f"{c.parameters:,}",
    }
    parts = []
    for title, cells in kinds.items():
        parts += [title, report.table(head, [row(name, found, cells) for name in WAYS])]
    parts += ["With positions growing, time and memory with gradients, as a power of them from"
              " 16×16 on:", powers(found)]  # fmt: skip
    return "\n\n".join(parts)


def powers(found: dict[int, dict[str, Cost]]) -> str:
    """How time and memory grow with the positions."""
    rows = []
    for name in WAYS:
        large = {n * n: costs[name] for n, costs in found.items() if name in costs and n >= 16}
        fitted = (
            growth.power(list(large), [max(1e-9, value(cost)) for cost in large.values()])
            for value in MEASURES.values()
        )
        rows.append([name, *(f"{power:.2f}" for power in fitted)])
    return report.table(["layer", "time", "memory"], rows)


def plot(found: dict[int, dict[str, Cost]], path: Path) -> None:
    """Time and memory with gradients against the map's side."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "context", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (label, value) in zip(axes, MEASURES.items(), strict=True):
        for name in WAYS:
            points = [(n, value(costs[name])) for n, costs in found.items() if name in costs]
            local = "×" in name
            axis.plot(*zip(*points, strict=True), "o--" if local else "o-", ms=3, lw=1.2,
                      label=name.replace("`", ""))  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="side of the map", ylabel=label)
        axis.set_xticks(list(found), [str(n) for n in found])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("One layer with all gradients, by the size of its map", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the maps")
    parser.add_argument("--dry", action="store_true", help="writes nothing")
    flags = parser.parse_args(arguments)
    found = {n: measure(n) for n in flags.sizes}
    if not flags.dry:
        plot(found, PLOT)
        text = (
            f"Batch {BATCH}, {CHANNELS} channels, {HEADS} heads, 16 channels of a lambda layer's"
            " keys; – where a layer would take minutes or gigabytes."
        )
        parts = [report.conditions("python benchmarks/context.py"), text, tables(found)]
        report.write_section("context", "\n\n".join(parts))


if __name__ == "__main__":
    main()
