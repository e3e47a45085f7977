"""Arrays in, arrays out: the functions under the layers, in `jax.numpy` only.

| module | what |
|---|---|
| `coordinates` | `grid`: the coordinates of a map's positions |
| `magnet` | `magnet`, `context_magnet`: kernels from coordinates; `gabor`, `context`: their parts |
| `hyperzzw` | `dot`, `product`, `convolution`, `twice`, `gate`: a hyper-kernel with activations |
| `lambdas` | `apply_lambdas`: queries times content and position lambdas |
| `convolution` | `fft_conv`, `depthwise_correlate`: every channel with its own kernel of any size |
| `spectral`, `taps`, `dense`, `grouped`, `window` | the methods of `fft_conv`, what they compute |
| `fourier`, `sharded_fft` | the transforms under the convolutions |
| `fastest`, `measured` | which method of convolution `auto` takes, and the measurements |
| `partitioning` | functions that devices share without gathering |
| `attention` | `local_attention`: every position with those around it; `rotary` |
| `pooling` | `adaptive_average`: adaptive average pooling |
| `channel_major` | the layout inside a block, and a pointwise layer in it |
| `activation` | `gelu`, exact and cheap; `gated`, a product with a sigmoid |
| `rematerialize`, `order` | gradients that compute again what they do not keep |
| `standardize` | `batch_standardize`, `instance_standardize`, `group_standardize` |
"""

from terminator_jax.ops import (
    activation,
    attention,
    channel_major,
    convolution,
    coordinates,
    fourier,
    hyperzzw,
    lambdas,
    magnet,
    pooling,
    standardize,
)
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.attention import local_attention, rotary
from terminator_jax.ops.convolution import depthwise_correlate, fft_conv
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
    "channel_major",
    "convolution",
    "coordinates",
    "depthwise_correlate",
    "fft_conv",
    "fourier",
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
