"""Fourier transforms of channel-major maps, as matrix products or as FFTs.

A circular convolution of length L is a product of spectra. Which positions of the circle a map or
a kernel occupies, and which are wanted of the result, is told as one `range` per axis, so that
padding and cropping cost nothing where the transform is a matrix.

Every transform here takes `(channels, batch, *spatial)` and gives a `Spectrum`. The order of the
frequencies is private to each transform, since spectra are only ever multiplied and transformed
back.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Positions = Sequence[range]


class Spectrum(NamedTuple):
    """Real and imaginary part, `(channels, batch, *frequencies)` each."""

    real: jax.Array
    imag: jax.Array


def multiply(a: Spectrum, b: Spectrum) -> Spectrum:
    """Multiplies complex numbers, broadcasting over the batch."""
    return Spectrum(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def conjugate(a: Spectrum) -> Spectrum:
    """Returns the spectrum of the map turned around: products with it are correlations."""
    return Spectrum(a.real, -a.imag)


class Transform(Protocol):
    """Transforms over circles of `lengths`, one per spatial axis."""

    lengths: tuple[int, ...]

    def forward(self, x: jax.Array, positions: Positions) -> Spectrum:
        """Computes the spectrum of a real map at these positions of the circles, zero elsewhere."""

    def inverse(self, spectrum: Spectrum, positions: Positions) -> jax.Array:
        """Computes the real map at these positions."""


class DFT:
    """Transforms by dense matrix products, one per axis; the last axis keeps half of itself.

    Lengths are those needed, whatever their prime factors.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)
        self._counts = (*self.lengths[:-1], self.lengths[-1] // 2 + 1)

    def forward(self, x: jax.Array, positions: Positions) -> Spectrum:
        matrices = self._matrices(positions, -1)
        spectrum = Spectrum(*_product(x, matrices[-1], -1))
        for axis, matrix in enumerate(reversed(matrices[:-1]), start=2):
            spectrum = _complex_product(spectrum, matrix, -axis)
        return spectrum

    def inverse(self, spectrum: Spectrum, positions: Positions) -> jax.Array:
        waves = zip(self._matrices(positions, +1), self.lengths, strict=True)
        matrices = [wave.T / length for wave, length in waves]
        matrices[-1] = matrices[-1] * conjugate_counts(self.lengths[-1])[:, None]
        for axis, matrix in enumerate(matrices[:-1], start=1):
            spectrum = _complex_product(spectrum, matrix, -axis)
        return _real_product(spectrum, matrices[-1], -len(matrices))

    def _matrices(self, positions: Positions, sign: int) -> list[np.ndarray]:
        axes = zip(positions, self._counts, self.lengths, strict=True)
        return [_dft_matrix(p, range(f), m, sign) for p, f, m in axes]


class LongDFT:
    """Transforms one long axis by products with small matrices: Cooley and Tukey's steps.

    The axis is folded into as many axes as there are factors; between the products along these
    come the twiddles. Where an FFT would put the frequencies back in order, this leaves them.
    """

    def __init__(self, lengths: Sequence[int]):
        if len(lengths) != 1:
            raise ValueError(f"only one axis can be folded, got lengths {tuple(lengths)}")
        steps = 2 if lengths[0] <= 2**14 else 3
        side = math.ceil(lengths[0] ** (1 / steps))
        self.factors = (side,) * (steps - 1) + (-(-lengths[0] // side ** (steps - 1)),)
        self.lengths = (math.prod(self.factors),)

    def forward(self, x: jax.Array, positions: Positions) -> Spectrum:
        folded = _pad_to_circle(x, positions, self.lengths).reshape(*x.shape[:2], *self.factors)
        axis = -len(self.factors)
        spectrum = Spectrum(*_product(folded, self._wave(0, -1), axis))
        for step in range(1, len(self.factors)):
            spectrum = multiply(spectrum, self._twiddle(step, -1, spectrum.real.dtype))
            spectrum = _complex_product(spectrum, self._wave(step, -1), axis)
        return spectrum

    def inverse(self, spectrum: Spectrum, positions: Positions) -> jax.Array:
        steps = len(self.factors)
        for step in range(steps - 1, 0, -1):
            wave = self._wave(step, +1).T / self.factors[step]
            spectrum = _complex_product(spectrum, wave, step - steps)
            twiddle = self._twiddle(step, +1, spectrum.real.dtype)
            spectrum = multiply(spectrum, _reordered(twiddle, steps, step))
        wave = self._wave(0, +1).T / self.factors[0] * conjugate_counts(self.factors[0])[:, None]
        x = _real_product(spectrum, wave, -steps)
        x = jnp.transpose(x, (0, 1, *range(x.ndim - 1, 1, -1)))
        return _crop(x.reshape(*x.shape[:2], *self.lengths), positions)

    def _count(self, step: int) -> int:
        """Frequencies kept of an axis: half of the first, since the map is real."""
        return self.factors[step] // 2 + 1 if step == 0 else self.factors[step]

    def _wave(self, step: int, sign: int) -> np.ndarray:
        length = self.factors[step]
        return _dft_matrix(range(length), range(self._count(step)), length, sign)

    def _twiddle(self, step: int, sign: int, dtype) -> Spectrum:
        """Returns factors between two steps: axes n_step … n_last (folded), k_0 … k_(step-1)."""
        rest = math.prod(self.factors[step:])
        last = self._count(step - 1)
        wave = _dft_matrix(range(rest), range(last), self.factors[step - 1] * rest, sign)
        shape = (1, 1, *self.factors[step:], *(1,) * (step - 1), last)
        return Spectrum(*(jnp.asarray(w.reshape(shape), dtype) for w in (wave.real, wave.imag)))


class FFT:
    """Transforms by XLA's real FFT; lengths are raised to ones with small prime factors."""

    def __init__(self, lengths: Sequence[int], *, exact: bool = False):
        self.lengths = tuple(lengths) if exact else tuple(fast_length(n) for n in lengths)

    def forward(self, x: jax.Array, positions: Positions) -> Spectrum:
        z = rfftn(_pad_to_circle(x, positions, self.lengths), x.ndim - 2)
        return Spectrum(z.real, z.imag)

    def inverse(self, spectrum: Spectrum, positions: Positions) -> jax.Array:
        return _crop(irfftn(jax.lax.complex(*spectrum), self.lengths), positions)


@functools.cache
def fast_length(n: int) -> int:
    """Returns the smallest number from n on with no prime factor but 2, 3 and 5.

    Example:
      >>> [fast_length(n) for n in (7, 13, 31, 1025)]
      [8, 15, 32, 1080]
    """
    best = 1 << (n - 1).bit_length()
    for fives in range(n.bit_length()):
        for threes in range(n.bit_length()):
            odd = 5**fives * 3**threes
            if odd >= best:
                break
            twos = max(0, (-(-n // odd) - 1).bit_length())
            best = min(best, odd << twos)
    return best


def _pad_to_circle(x: jax.Array, positions: Positions, lengths: Sequence[int]) -> jax.Array:
    """Returns the map on its circles, zero where it is not."""
    margins = [(p.start, m - p.stop) for p, m in zip(positions, lengths, strict=True)]
    if min(min(pair) for pair in margins) >= 0:
        return jnp.pad(x, [(0, 0), (0, 0), *margins])
    # It reaches over the end of a circle: begin at 0 and roll.
    padded = jnp.pad(x, [(0, 0), (0, 0), *((0, sum(pair)) for pair in margins)])
    return jnp.roll(padded, [p.start for p in positions], range(2, x.ndim))


def _crop(x: jax.Array, positions: Positions) -> jax.Array:
    """Returns the wanted positions of a map on its circles."""
    pairs = list(zip(positions, x.shape[2:], strict=True))
    if any(p.start < 0 or p.stop > m for p, m in pairs):
        x = jnp.roll(x, [-p.start for p in positions], range(2, x.ndim))
        positions = [range(len(p)) for p in positions]
    return x[(..., *(slice(p.start, p.stop) for p in positions))]


def _reordered(twiddle: Spectrum, steps: int, step: int) -> Spectrum:
    """Returns a twiddle as the way back needs it: axes k_0, …, k_(step-1), n_last, …, n_step."""
    order = (*range(steps - step, steps), *range(steps - step - 1, -1, -1))
    order = (0, 1, *(axis + 2 for axis in order))
    return Spectrum(*(jnp.transpose(part, order) for part in twiddle))


def _dft_matrix(positions: range, frequencies: range, length: int, sign: int) -> np.ndarray:
    """Computes `exp(sign 2πi position frequency / length)`, `(positions, frequencies)`, exactly."""
    turns = np.outer(positions, frequencies) % length / length
    return np.exp(sign * 2j * np.pi * turns)


def _complex_product(x: Spectrum, matrix: np.ndarray, axis: int) -> Spectrum:
    (rr, ri), (ir, ii) = (_product(part, matrix, axis) for part in x)
    return Spectrum(rr - ii, ri + ir)


def _real_product(x: Spectrum, matrix: np.ndarray, axis: int) -> jax.Array:
    """Computes the real part of `x` times a matrix."""
    return _tensordot(x.real, matrix.real, axis) - _tensordot(x.imag, matrix.imag, axis)


def _product(x: jax.Array, matrix: np.ndarray, axis: int) -> list[jax.Array]:
    """Computes `x` times the real and the imaginary part of a matrix, in one product."""
    return jnp.split(_tensordot(x, np.concatenate([matrix.real, matrix.imag], 1), axis), 2, axis=-1)


def _tensordot(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
    """Contracts one axis of `x` with the first of `matrix`, and puts the result last."""
    contract = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    return contract(x, jnp.asarray(matrix, x.dtype), axes=(axis, 0))


# XLA's own partitioner gathers whatever an FFT reads, on every device, although each map has a
# transform of its own. What follows tells it so, and is differentiable any number of times.


def rfftn(x: jax.Array, dims: int) -> jax.Array:
    """Computes `jnp.fft.rfftn` over the last `dims` axes.

    Example:
      >>> rfftn(jnp.ones((2, 4, 6)), 1).shape
      (2, 4, 4)
    """
    return _transform(x.shape[-dims:], False, x)


def irfftn(z: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """Computes `jnp.fft.irfftn` over the last axes, to as many positions as `lengths` says.

    Example:
      >>> print(irfftn(rfftn(jnp.arange(5.0), 1), (5,)).round(4))
      [0. 1. 2. 3. 4.]
    """
    return _transform(tuple(lengths), True, z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _transform(lengths: tuple[int, ...], inverse: bool, x: jax.Array) -> jax.Array:
    """Computes a real FFT or its inverse; `shard_leading_axes` has no gradient of its own."""
    return _inverse(lengths)(x) if inverse else _forward(len(lengths))(x)


def _transform_backward(lengths, inverse, _, dy):
    # With c how often a frequency counts (`conjugate_counts`), N the positions and θ the phases,
    #   rfftn y_k = Σ_n x_n exp(-iθ);   irfftn x_n = Re Σ_k c_k z_k exp(iθ) / N.
    scale = conjugate_counts(lengths[-1]) / math.prod(lengths)
    scale = jnp.asarray(scale, jnp.finfo(dy.dtype).dtype).reshape((1,) * (dy.ndim - 1) + (-1,))
    if inverse:
        return (jnp.conj(_transform(lengths, False, dy)) * scale,)
    return (_transform(lengths, True, jnp.conj(dy) / scale),)


def _transform_forward(lengths, inverse, x):
    return _transform(lengths, inverse, x), None


_transform.defvjp(_transform_forward, _transform_backward)


def conjugate_counts(length: int) -> np.ndarray:
    """Returns how often half an axis counts each frequency: twice, but for those without a twin."""
    counts = np.full(length // 2 + 1, 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    return counts


@functools.cache
def _forward(dims: int):
    return shard_leading_axes(lambda x: jnp.fft.rfftn(x, axes=range(-dims, 0)), dims)


@functools.cache
def _inverse(lengths: tuple[int, ...]):
    axes = range(-len(lengths), 0)
    return shard_leading_axes(lambda z: jnp.fft.irfftn(z, lengths, axes), len(lengths))


def shard_leading_axes(function: Callable[[jax.Array], jax.Array], dims: int) -> Callable:
    """Makes `function` act on an array's last `dims` axes, so that devices may share the others.

    It keeps the other axes as they are. The result has no derivative of its own.

    Example:
      >>> total = shard_leading_axes(lambda x: x.sum(-1, keepdims=True), 1)
      >>> jax.vmap(total)(jnp.ones((3, 2, 5))).shape
      (3, 2, 1)
    """
    partitioned = custom_partitioning(function)

    def partition(mesh, arguments, result):
        sharding, rank = arguments[0].sharding, len(result.shape)
        lead = (*sharding.spec, *[None] * rank)[: rank - dims]
        own = NamedSharding(sharding.mesh, PartitionSpec(*lead, *[None] * dims))
        return mesh, function, own, (own,)

    def rule(mesh, arguments, results):
        lead = [f"l{n}" for n in range(len(arguments[0].shape) - dims)]
        before, after = ([f"{name}{n}" for n in range(dims)] for name in "ab")
        text = f"{' '.join(lead + before)} -> {' '.join(lead + after)}"
        return text, dict(need_replication_factors=(*before, *after))

    partitioned.def_partition(partition, sharding_rule=rule)
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def with_one_more_axis(axis_size, is_mapped, x):
        return mapped(x), True  # custom_vmap puts the axis first

    return mapped
