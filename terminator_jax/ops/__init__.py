"""Arrays in, arrays out: the functions under the layers, in `jax.numpy` only.

| module | what |
|---|---|
| `coordinates` | `grid`: the coordinates of a map's positions |
| `magnet` | `magnet`, `context_magnet`: kernels from coordinates; `gabor`, `context`: their parts |
| `hyperzzw` | `dot`, `product`, `convolution`, `gate`: a hyper-kernel with activations |
| `lambdas` | `apply_lambdas`: queries times content and position lambdas |
| `conv` | `fft_conv`, `depthwise_correlate`: every channel with its own kernel of any size |
| `platform` | choices that depend on the platform |
| `attention` | `local_attention`: every position with those around it; `rotary` |
| `pooling` | `adaptive_average`: adaptive average pooling |
| `fused_sfne` | `fused_sfne`: the SFNE block in fewer and larger operations |
| `channels_first` | the layout of fast paths, and a pointwise layer in it |
| `activation` | `gelu`, exact and cheap, and `erf` |
| `dtypes` | `at_least_float32`: the dtype of sums |
| `standardize` | `batch_standardize`, `instance_standardize`, `group_standardize` |
"""

from terminator_jax.ops import (
    activation,
    attention,
    channels_first,
    conv,
    coordinates,
    fused_sfne,
    hyperzzw,
    lambdas,
    magnet,
    pooling,
    standardize,
)
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.attention import local_attention, rotary
from terminator_jax.ops.conv import depthwise_correlate, fft_conv
from terminator_jax.ops.coordinates import grid
from terminator_jax.ops.lambdas import apply_lambdas
from terminator_jax.ops.pooling import adaptive_average
from terminator_jax.ops.standardize import (
    batch_standardize,
    group_standardize,
    instance_standardize,
)

__all__ = [
    "activation",
    "adaptive_average",
    "apply_lambdas",
    "attention",
    "batch_standardize",
    "channels_first",
    "conv",
    "coordinates",
    "depthwise_correlate",
    "fft_conv",
    "fused_sfne",
    "gelu",
    "grid",
    "group_standardize",
    "hyperzzw",
    "instance_standardize",
    "lambdas",
    "local_attention",
    "magnet",
    "pooling",
    "rotary",
    "standardize",
]
