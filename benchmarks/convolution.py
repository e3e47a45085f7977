"""Depthwise convolutions against each other: time and peak memory, with and without gradient.

    python benchmarks/convolution.py            # writes docs/performance.md
    python benchmarks/convolution.py --quick    # a few points, writes nothing
    python benchmarks/convolution.py --check    # ours only: is `auto` right?

Ours are `fft`, `dft`, `direct`, `lax` (XLA's grouped convolution) and `auto`; beside them an FFT
convolution differentiated by JAX (`jnp fft`), and PyTorch's grouped convolution and FFT where torch
is installed. All meet the same arrays in the same process.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing

from terminator_jax.ops.conv import METHODS, fft_conv

try:
    import torch
except ImportError:
    torch = None

TOLERATED = 1.2  # of auto's time, over that of the best
ELEMENTS = 2**21  # of a map, so that times compare across sizes


class Point(NamedTuple):
    """Sizes of one comparison."""

    dims: int
    length: int
    kernel: int
    per_sample: bool = False
    batch: int = 0
    channels: int = 0

    @property
    def lead(self) -> tuple[int, int]:
        """Batch and channels."""
        if self.batch:
            return self.batch, self.channels
        maps = max(1, ELEMENTS // self.length**self.dims)
        channels = min(32, maps)
        return min(64, maps // channels), channels

    @property
    def products(self) -> int:
        """Multiplications of a convolution by its definition."""
        return math.prod(self.lead) * (self.length * self.kernel) ** self.dims

    def label(self) -> str:
        """For a table's first columns."""
        batch, channels = self.lead
        size = "×".join([str(self.length)] * self.dims)
        kernel = "×".join([str(self.kernel)] * self.dims)
        return f"{batch}×{size}×{channels} | {kernel}{' per sample' if self.per_sample else ''}"


def points() -> list[Point]:
    """Lengths up to 2^20 in 1-D and 512 in 2-D, kernels up to the map's size."""
    lengths = {1: [4**p for p in range(3, 11)], 2: [8, 16, 32, 64, 128, 512], 3: [8, 16]}
    kernels = {1: (3, 33, 1023), 2: (3, 9, 33), 3: (3,)}
    every = []
    for dims, sizes in lengths.items():
        for n in sizes:
            every += [Point(dims, n, k) for k in (*(k for k in kernels[dims] if 2 * k < n), n)]
            if n**dims <= 2**16:
                every.append(Point(dims, n, n, per_sample=True))
    return [*every, Point(2, 32, 5, True), Point(2, 32, 9, batch=16, channels=144)]


QUICK = [Point(1, 256, 9), Point(1, 4096, 4096), Point(2, 8, 9), Point(2, 32, 9, True)]


def feasible(method: str, point: Point, gradient: bool) -> bool:
    """Whether a method is worth trying: compiles and runs in seconds, and fits in memory."""
    taps = point.kernel**point.dims
    limits = {
        "direct": taps <= 129,
        "lax": not point.per_sample and point.products <= (2e7 if gradient else 2e8),
        "torch": not point.per_sample and point.products <= (2e8 if gradient else 2e9),
    }
    return limits.get(method, True)


def naive_fft(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """An FFT convolution as one writes it down, with JAX's own gradient."""
    axes = tuple(range(1, x.ndim - 1))
    kernel = kernel if kernel.ndim == x.ndim else kernel[None]
    sizes = [(x.shape[a], kernel.shape[a]) for a in axes]
    lengths = [n + k - 1 for n, k in sizes]
    spectrum = jnp.fft.rfftn(x, lengths, axes) * jnp.fft.rfftn(kernel, lengths, axes)
    full = jnp.fft.irfftn(spectrum, lengths, axes)
    return full[(slice(None), *(slice((k - 1) // 2, (k - 1) // 2 + n) for n, k in sizes))]


def jax_call(function: Callable, arrays, gradient: bool) -> Callable[[], object]:
    """The compiled function, or it and its two gradients, to be timed."""

    def both(x, kernel, w):
        out, pullback = jax.vjp(function, x, kernel)
        return out, pullback(w)

    run = both if gradient else lambda x, kernel, w: function(x, kernel)
    compiled = jax.jit(run).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def torch_call(name: str, point: Point, arrays, gradient: bool) -> Callable[[], object]:
    """The same in PyTorch, in its own layout (channels first)."""
    x, kernel, w = (
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.array(a), -1, -1 - point.dims)))
        for a in arrays
    )
    axes = tuple(range(-point.dims, 0))

    def grouped(x, kernel):
        convolve = getattr(torch.nn.functional, f"conv{point.dims}d")
        weight = torch.flip(kernel, axes)[:, None]
        return convolve(x, weight, padding="same", groups=len(kernel))

    def by_fft(x, kernel):
        lengths = [x.shape[a] + kernel.shape[a] - 1 for a in axes]
        spectrum = torch.fft.rfftn(x, lengths, axes) * torch.fft.rfftn(kernel, lengths, axes)
        full = torch.fft.irfftn(spectrum, lengths, axes)
        starts = [(kernel.shape[a] - 1) // 2 for a in axes]
        cuts = [slice(s, s + x.shape[a]) for s, a in zip(starts, axes, strict=True)]
        return full[(..., *cuts)]

    function = {"torch": grouped, "torch fft": by_fft}[name]
    if not gradient:
        return lambda: function(x, kernel)
    x.requires_grad_(), kernel.requires_grad_()

    def both():
        x.grad = kernel.grad = None
        function(x, kernel).backward(w)
        return x.grad, kernel.grad

    return both


def arrays_of(point: Point) -> list[jax.Array]:
    """A map, a kernel and a gradient of the result."""
    rng = np.random.default_rng(0)
    batch, channels = point.lead
    shape = (batch, *[point.length] * point.dims, channels)
    size = (*[batch] * point.per_sample, *[point.kernel] * point.dims, channels)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, size, shape)]


def calls_of(point: Point, arrays, gradient: bool) -> dict[str, Callable[[], object]]:
    """Every feasible way."""
    ways = {m: lambda x, k, m=m: fft_conv(x, k, method=m) for m in METHODS[1:]}
    ways["jnp fft"] = naive_fft
    calls = {
        name: jax_call(function, arrays, gradient)
        for name, function in ways.items()
        if feasible(name, point, gradient)
    }
    if torch is not None:
        for name in ("torch", "torch fft"):
            if feasible(name, point, gradient):
                calls[name] = torch_call(name, point, arrays, gradient)
    return calls


class Result(NamedTuple):
    """Seconds and peak bytes by method, and what `auto` took beside the best of ours."""

    point: Point
    gradient: bool
    seconds: dict[str, float]
    peaks: dict[str, int]
    auto: float


def measure(point: Point, gradient: bool) -> Result:
    """All methods at one point, and `auto` beside the best of ours."""
    arrays = arrays_of(point)
    calls = calls_of(point, arrays, gradient)
    seconds = timing.medians(calls, seconds=0.5)
    peaks = {name: timing.peak_bytes(call) for name, call in calls.items()}
    best = min((m for m in METHODS[1:] if m in seconds), key=seconds.get)
    auto = jax_call(lambda x, k: fft_conv(x, k), arrays, gradient)
    pair = shortest({"best": calls[best], "auto": auto}, repeats=25)
    # The shortest times: of one program, medians of a few runs differ by a third.
    return Result(point, gradient, seconds, peaks, pair["auto"] / pair["best"])


def check(only: str) -> None:
    """Times ours and `auto` anew, and prints the ratios."""
    chosen = [point for point in points() if only in point.label()]
    ratios = [ratio for point in chosen for ratio in check_point(point)]
    above = sum(ratio > TOLERATED for ratio in ratios)
    print(f"{len(ratios)} times; auto / best: at most {max(ratios):.2f}, {above} above {TOLERATED}")


def check_point(point: Point) -> Iterator[float]:
    """The time of `auto` over that of the best of ours, forward and with gradients."""
    for gradient in (False, True):
        arrays = arrays_of(point)
        ways = {
            name: jax_call(lambda x, k, m=name: fft_conv(x, k, method=m), arrays, gradient)
            for name in METHODS
            if name == "auto" or feasible(name, point, gradient)
        }
        # The shortest of many times, since other processes only ever add to them; and of more if
        # that is not enough to see `auto` as fast as the method that it takes.
        times = shortest(ways, repeats=15, seconds=0.4)
        best = min(times.keys() - {"auto"}, key=times.get)
        if times["auto"] > 1.1 * times[best]:
            pair = {name: ways[name] for name in ("auto", best)}
            again = shortest(pair, repeats=40, seconds=2.0)
            times = {name: min(times[name], again[name]) for name in pair}
        ratio = times["auto"] / times[best]
        print(f"{ratio:.2f}", best, point.label(), gradient, sep=" | ", flush=True)
        yield ratio


def shortest(calls: dict[str, Callable[[], object]], **limits) -> dict[str, float]:
    """The shortest time of each call."""
    return {name: min(own) for name, own in timing.series(calls, **limits).items()}


def line(result: Result) -> list[str]:
    """A row of the table: times with peaks, the fastest in bold."""
    columns = [*METHODS[1:], "jnp fft", "torch", "torch fft"]
    quickest = min(result.seconds.values())

    def cell(name):
        if name not in result.seconds:
            return "–"
        seconds, peak = result.seconds[name], result.peaks[name]
        text = f"{seconds * 1e3:.3g}"
        return f"{f'**{text}**' if seconds == quickest else text} / {peak / 1e6:.0f}"

    return [result.point.label(), *map(cell, columns), f"{result.auto:.2f}"]


def growth(results: list[Result]) -> str:
    """How the time of the best method grows along 1-D lengths, for kernels as long as the map."""
    rows = []
    for r in results:
        p = r.point
        if p.dims == 1 and p.kernel == p.length and r.gradient and not p.per_sample:
            best = min(r.seconds[m] for m in METHODS[1:] if m in r.seconds)
            each = best / math.prod(p.lead) / p.length / math.log2(p.length)
            rows.append(
                [f"2^{p.length.bit_length() - 1}", f"{best * 1e3:.3g}", f"{each * 1e9:.3g}"]
            )
    head = ["length", "ms, with gradient", "ns per position and log2(length)"]
    return report.table(head, rows)


def page(results: list[Result]) -> str:
    """The section of `docs/performance.md`."""
    head = ["map | kernel", *METHODS[1:], "jnp fft", "torch", "torch fft", "auto / best"]
    head = " | ".join(head).split(" | ")
    parts = [report.conditions("python benchmarks/convolution.py")]
    parts.append("Milliseconds / peak MB; – where a method would take minutes or gigabytes.")
    for title, gradient in (("Forward", False), ("With both gradients", True)):
        rows = [line(r) for r in results if r.gradient == gradient]
        parts += [f"### {title}", report.table(head, rows)]
    worst = max(results, key=lambda r: r.auto)
    parts.append(
        "`auto` / best compares the shortest times of the best of ours and of `auto`, which runs"
        f" it: at most {worst.auto:.2f}."
    )
    parts += ["### Growth with length", growth(results)]
    return "\n\n".join(parts)


def main() -> None:
    """Measures, prints and writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few points, writes nothing")
    parser.add_argument(
        "--check", nargs="?", const="", metavar="TEXT",
        help="whether auto is right (at points in whose label TEXT is)",
    )  # fmt: skip
    flags = parser.parse_args()
    quick = flags.quick
    # PyTorch's, about even kernels.
    warnings.filterwarnings("ignore", "Using padding='same'")
    if flags.check is not None:
        return check(flags.check)
    results = []
    for point in QUICK if quick else points():
        for gradient in (False, True):
            results.append(measure(point, gradient))
            print(*line(results[-1]), "with gradient" if gradient else "", sep=" | ", flush=True)
    if not quick:
        report.write_section("convolution", page(results))


if __name__ == "__main__":
    main()
