"""The fastest methods of convolution; written by `benchmarks/convolution.py`, not by hand."""

from typing import NamedTuple


class Point(NamedTuple):
    """What was fastest for maps of `length` and kernels of `kernel` positions along each axis."""

    platform: str
    dims: int
    length: int
    kernel: int
    per_sample: bool
    forward: str
    gradient: str


POINTS: tuple[Point, ...] = ()
