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


POINTS: tuple[Point, ...] = (
    Point("cpu", 1, 64, 3, False, "direct", "dense"),
    Point("cpu", 1, 64, 64, False, "dense", "dense"),
    Point("cpu", 1, 64, 64, True, "direct", "dft"),
    Point("cpu", 1, 256, 3, False, "direct", "direct"),
    Point("cpu", 1, 256, 33, False, "direct", "direct"),
    Point("cpu", 1, 256, 256, False, "fft", "fft"),
    Point("cpu", 1, 256, 256, True, "fft", "dft"),
    Point("cpu", 1, 1024, 3, False, "direct", "direct"),
    Point("cpu", 1, 1024, 33, False, "direct", "fft"),
    Point("cpu", 1, 1024, 1024, False, "fft", "fft"),
    Point("cpu", 1, 1024, 1024, True, "fft", "fft"),
    Point("cpu", 1, 4096, 3, False, "direct", "direct"),
    Point("cpu", 1, 4096, 33, False, "direct", "direct"),
    Point("cpu", 1, 4096, 1023, False, "fft", "fft"),
    Point("cpu", 1, 4096, 4096, False, "fft", "fft"),
    Point("cpu", 1, 4096, 4096, True, "fft", "fft"),
    Point("cpu", 1, 16384, 3, False, "direct", "direct"),
    Point("cpu", 1, 16384, 33, False, "direct", "direct"),
    Point("cpu", 1, 16384, 1023, False, "fft", "fft"),
    Point("cpu", 1, 16384, 16384, False, "fft", "fft"),
    Point("cpu", 1, 16384, 16384, True, "fft", "fft"),
    Point("cpu", 1, 65536, 3, False, "direct", "direct"),
    Point("cpu", 1, 65536, 33, False, "direct", "direct"),
    Point("cpu", 1, 65536, 1023, False, "fft", "fft"),
    Point("cpu", 1, 65536, 65536, False, "fft", "fft"),
    Point("cpu", 1, 65536, 65536, True, "fft", "fft"),
    Point("cpu", 1, 262144, 3, False, "direct", "direct"),
    Point("cpu", 1, 262144, 33, False, "direct", "direct"),
    Point("cpu", 1, 262144, 1023, False, "fft", "fft"),
    Point("cpu", 1, 262144, 262144, False, "fft", "fft"),
    Point("cpu", 1, 1048576, 3, False, "direct", "direct"),
    Point("cpu", 1, 1048576, 33, False, "direct", "direct"),
    Point("cpu", 1, 1048576, 1023, False, "fft", "fft"),
    Point("cpu", 1, 1048576, 1048576, False, "fft", "fft"),
    Point("cpu", 2, 8, 3, False, "direct", "direct"),
    Point("cpu", 2, 8, 8, False, "direct", "dense"),
    Point("cpu", 2, 8, 8, True, "direct", "direct"),
    Point("cpu", 2, 16, 3, False, "direct", "direct"),
    Point("cpu", 2, 16, 16, False, "dft", "dft"),
    Point("cpu", 2, 16, 16, True, "dft", "dft"),
    Point("cpu", 2, 32, 3, False, "direct", "direct"),
    Point("cpu", 2, 32, 5, True, "direct", "direct"),
    Point("cpu", 2, 32, 9, False, "direct", "direct"),
    Point("cpu", 2, 32, 32, False, "fft", "dft"),
    Point("cpu", 2, 32, 32, True, "fft", "dft"),
    Point("cpu", 2, 64, 3, False, "direct", "direct"),
    Point("cpu", 2, 64, 9, False, "direct", "direct"),
    Point("cpu", 2, 64, 64, False, "dft", "dft"),
    Point("cpu", 2, 64, 64, True, "dft", "dft"),
    Point("cpu", 2, 128, 3, False, "direct", "direct"),
    Point("cpu", 2, 128, 9, False, "direct", "direct"),
    Point("cpu", 2, 128, 33, False, "fft", "fft"),
    Point("cpu", 2, 128, 128, False, "fft", "fft"),
    Point("cpu", 2, 128, 128, True, "fft", "fft"),
    Point("cpu", 2, 512, 3, False, "direct", "fft"),
    Point("cpu", 2, 512, 9, False, "direct", "fft"),
    Point("cpu", 2, 512, 33, False, "fft", "fft"),
    Point("cpu", 2, 512, 512, False, "fft", "fft"),
    Point("cpu", 3, 8, 3, False, "direct", "direct"),
    Point("cpu", 3, 8, 8, False, "fft", "fft"),
    Point("cpu", 3, 8, 8, True, "fft", "dft"),
    Point("cpu", 3, 16, 3, False, "direct", "direct"),
    Point("cpu", 3, 16, 16, False, "dft", "dft"),
    Point("cpu", 3, 16, 16, True, "dft", "dft"),
)
