"""Depthwise convolution with kernels of any size.

| module | what |
|---|---|
| `convolution` | `fft_conv`, `depthwise_correlate` and the definition, `convolve_reference` |
| `methods` | the same with channels first, by the method that is named or chosen |
| `per_map` | several maps with a kernel each, in one call |
| `window` | which part of the full convolution is wanted |
| `direct` | one multiply-add per kernel position |
| `spectral` | products of spectra: the methods `fft` and `dft` |
| `fourier` | their transforms |
"""

from terminator_jax.ops.conv.convolution import (
    METHODS,
    PADDINGS,
    convolve_reference,
    depthwise_correlate,
    fft_conv,
)

__all__ = ["METHODS", "PADDINGS", "convolve_reference", "depthwise_correlate", "fft_conv"]
