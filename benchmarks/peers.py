"""Lambda layers and local attention beside the PyTorch packages that are known for them.

    python benchmarks/peers.py       # writes a section of docs/performance.md

Needs them: `pip install torch einops lambda-networks nonlinear-transformer` (the last one is
imported as `heptapod`). Both sides have the same weights and meet the same arrays, in float32, in
one process; their results are compared before they are timed. Their gradients are compared by the
tests, with vectors of the packages, and not here: those that PyTorch 2.13 has of the lambda layer
are not what its own finite differences give.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import calls
import jax
import numpy as np
import report
import timing
import torch
from flax import nnx
from heptapod import Local2DAttention
from lambda_networks import LambdaLayer as TorchLambdaLayer

from terminator_jax.convert_lambda import lambda_layer_from_torch
from terminator_jax.layers import LocalAttention2D

TOLERANCE = 1e-4  # relative, of results


class Pair(NamedTuple):
    """A layer twice, and the shape of what it is given here, channels last."""

    package: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[torch.nn.Module, nnx.Module]]
    channels_first: bool = False


def lambda_layers(**options) -> Callable[[], tuple[torch.nn.Module, nnx.Module]]:
    """A lambda layer of 32 channels, 16 of a key, in 4 heads."""

    def make():
        theirs = TorchLambdaLayer(dim=32, dim_out=32, dim_k=16, heads=4, dim_u=1, **options)
        return theirs, lambda_layer_from_torch(theirs.state_dict())

    return make


def local_attention() -> tuple[torch.nn.Module, nnx.Module]:
    """The package's layer, and ours without projections and turns: the same formula."""
    ours = LocalAttention2D(512, 3, heads=1, project=False, turn=False, rngs=nnx.Rngs(0))
    return Local2DAttention(512, window_size=3), ours


PAIRS = {
    "lambda, global, 1×64×64×32": Pair(
        "lambda-networks", (1, 64, 64, 32), lambda_layers(n=64), True
    ),
    "lambda, 23×23, 1×64×64×32": Pair(
        "lambda-networks", (1, 64, 64, 32), lambda_layers(r=23), True
    ),
    "attention, 7×7, 4×32×32×512": Pair("nonlinear-transformer", (4, 32, 32, 512), local_attention),
}


def torch_calls(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> calls.Calls:
    """As `calls.compiled`, of a PyTorch layer."""
    x = x.requires_grad_()

    def forward():
        with torch.no_grad():
            return layer(x)

    def gradient():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y, x.grad

    return calls.Calls(forward, gradient)


def compare(pair: Pair) -> tuple[calls.Calls, calls.Calls]:
    """Both layers' calls, theirs first, after a look whether they agree."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=pair.shape).astype(np.float32) for _ in range(2))
    theirs, ours = pair.make()

    def placed(a):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1)))

    given = [placed(a) if pair.channels_first else torch.from_numpy(a.copy()) for a in (x, dy)]
    both = torch_calls(theirs, *given), calls.compiled(ours, x, dy)
    expected, found = both[0].forward().numpy(), both[1].forward()[0]
    if pair.channels_first:
        expected = np.moveaxis(expected, 1, -1)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"results differ by {error:.1e}")
    if not error < TOLERANCE:
        raise SystemExit("the results are not the same")
    return both


def rows(name: str, pair: Pair) -> list[list[str]]:
    """Forward and with gradients: theirs, ours and how many times more theirs takes."""
    theirs, ours = compare(pair)
    table = []
    for kind in calls.Calls._fields:
        both = dict(theirs=getattr(theirs, kind), ours=getattr(ours, kind))
        seconds = timing.medians(both, repeats=25, seconds=15)
        peaks = {who: timing.peak_bytes(call) for who, call in both.items()}
        table.append([
            name if kind == "forward" else "… with gradients",
            "×".join(map(str, pair.shape)), f"`{pair.package}`",
            *(f"{seconds[who] * 1e3:,.0f}" for who in both),
            f"{seconds['theirs'] / seconds['ours']:.1f}",
            *(f"{peaks[who] / 1e6:,.1f}" for who in both),
            f"{peaks['theirs'] / max(1, peaks['ours']):.1f}",
        ])  # fmt: skip
        print(*table[-1], sep=" | ", flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="writes nothing")
    flags = parser.parse_args(arguments)
    head = ["layer", "input", "package", "its ms", "ours", "ratio", "its peak MB", "ours", "ratio"]
    measured = [line for name, pair in PAIRS.items() for line in rows(name, pair)]
    if not flags.dry:
        text = (
            f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads;"
            f" jax {jax.__version__}. Medians."
        )
        parts = [
            report.conditions("python benchmarks/peers.py"),
            text,
            report.table(head, measured),
        ]
        report.write_section("peers", "\n\n".join(parts))


if __name__ == "__main__":
    main()
