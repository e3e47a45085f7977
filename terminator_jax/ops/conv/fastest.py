"""Which method of convolution is fastest, from the measurements in `measured.py`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from terminator_jax.ops.conv.measured import POINTS

# Where nobody has measured: one method up to so many kernel positions, and one beyond them.
SMALL = 81
UP_TO = {"tpu": "lax", "gpu": "direct", "cpu": "direct"}
BEYOND = {"tpu": "dft", "gpu": "fft", "cpu": "fft"}


class Choice(NamedTuple):
    """Methods of `fft_conv`: for the result alone, and where a gradient is taken."""

    forward: str
    gradient: str


def fastest(platform: str, spatial: Sequence[int], size: Sequence[int], per_sample: bool) -> Choice:
    """Returns the methods that were fastest at the point measured that is nearest.

    Args:
      platform: `"cpu"`, `"gpu"` or `"tpu"`.
      spatial: positions of the map per axis.
      size: positions of the kernel per axis.
      per_sample: whether each sample has a kernel of its own.

    Example:
      >>> fastest("cpu", (512, 512), (512, 512), False).forward in ("dft", "fft")
      True
    """
    alike = [
        p for p in POINTS
        if (p.platform, p.dims, p.per_sample) == (platform, len(spatial), per_sample)
    ]  # fmt: skip
    if not alike:
        # XLA's convolution cannot have as many groups as a batch of unknown size has samples.
        small = math.prod(size) <= SMALL and not (per_sample and UP_TO[platform] == "lax")
        method = UP_TO[platform] if small else BEYOND[platform]
        return Choice(method, method)

    def distance(point):
        lengths = zip((point.length, point.kernel), (spatial, size), strict=True)
        return sum(abs(math.log2(a) - _side(b)) for a, b in lengths)

    best = min(alike, key=distance)
    return Choice(best.forward, best.gradient)


def _side(lengths: Sequence[int]) -> float:
    """Returns the logarithm of the geometric mean."""
    return math.log2(math.prod(lengths)) / len(lengths)
