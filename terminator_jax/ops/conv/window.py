"""Which part of a convolution is wanted, and so which padding it has."""

from collections.abc import Sequence
from typing import NamedTuple

import jax


class Window(NamedTuple):
    """What is wanted of a convolution: positions `start` and on, `count` of them, per axis."""

    start: tuple[int, ...]
    count: tuple[int, ...]
    circular: bool

    def positions(self) -> list[range]:
        """Returns the wanted positions of each axis."""
        return [range(s, s + c) for s, c in zip(self.start, self.count, strict=True)]


def bounds(
    spatial: Sequence[int], size: Sequence[int], padding: str, correlate: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the first position wanted of the full convolution, and how many, per axis."""
    starts = {
        "same": lambda k: k // 2 if correlate else (k - 1) // 2,
        "causal": lambda k: 0,
        "valid": lambda k: k - 1,
    }
    starts["circular"] = starts["same"]
    start = tuple(starts[padding](k) for k in size)
    if padding == "valid":
        return start, tuple(n - k + 1 for n, k in zip(spatial, size, strict=True))
    return start, tuple(spatial)


def all_positions(x: jax.Array) -> list[range]:
    """Positions from 0 on, as many as the map has."""
    return [range(n) for n in x.shape[2:]]
