"""Lambda layers: the context becomes one linear function per position, applied to the queries.

Each query is multiplied by a matrix λ `(k, v)`. λ is the sum of the content lambda, one for the
whole map, and the position lambda, one for each position. The position lambda is a correlation of
the values with a table of relative positions,

    λp[n, k, v] = Σ_{m,u} table[m - n + centre, k, u] values[m, u, v]

with zeros where m lies outside the map. A table of a few positions gives a local context. A table
of 2 n - 1 positions on an axis of n gives a global context.

    rows   one row of the map after the other, by products with Toeplitz matrices of the table's
           rows
    dft    the correlation as a product of spectra, by transforms that are matrix products
    fft    the same by FFTs
    auto   `rows` for small maps in large batches, else `fft` on a GPU and `dft` elsewhere

Every method computes the lambdas of one row, or of a few keys, multiplies the queries by them and
drops them. The gradient recomputes them. So the lambdas of all positions are never in memory
together. The table of all pairs of positions has millions of entries; only
`position_lambdas_reference`, the definition for the tests, makes it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from terminator_jax.ops.channels_first import match_varying_axes
from terminator_jax.ops.conv.fourier import DFT, FFT, LongDFT, Spectrum, Transform
from terminator_jax.ops.conv.spectral import DENSE_UP_TO
from terminator_jax.ops.conv.window import all_positions
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.platform import by_platform

METHODS = ("auto", "rows", "dft", "fft")
# `auto` takes the method `rows` for maps with at most this many rows.
MAX_ROWS = 32
# The largest size of the spectra of lambdas in memory. More keys are processed in chunks.
SPECTRA_BYTES = 2**24


def normalize_keys(keys: jax.Array) -> jax.Array:
    """Computes the softmax of the keys over the positions, in float32 or wider.

    Args:
      keys: `(batch, *spatial, u, k)`.

    Example:
      >>> print(normalize_keys(jnp.zeros((1, 2, 5, 1, 3))).ravel()[0])
      0.1
    """
    keys = floating(keys)
    wide = keys.astype(at_least_float32(keys.dtype))
    flat = wide.reshape(keys.shape[0], -1, *keys.shape[-2:])
    return jax.nn.softmax(flat, 1).reshape(keys.shape)


def content_lambdas(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Computes `λc[k, v] = Σ_{n,u} keys[n, u, k] values[n, u, v]` of each sample, `(batch, k, v)`.

    Args:
      keys: `(batch, *spatial, u, k)`, normalized.
      values: `(batch, *spatial, u, v)`.
    """
    keys, values = floating((keys, values))
    wide = at_least_float32(keys.dtype, values.dtype)
    keys, values = (a.reshape(a.shape[0], -1, a.shape[-1]).astype(wide) for a in (keys, values))
    return jnp.einsum("bmk,bmv->bkv", keys, values)


def position_lambdas_reference(values: jax.Array, table: jax.Array) -> jax.Array:
    """Computes the position lambdas by definition: gathers the table for every pair of positions.

    Args:
      values: `(batch, *spatial, u, v)`.
      table: `(*window, k, u)`.

    Returns:
      `(batch, *spatial, k, v)`.
    """
    values, table = floating((values, table))
    spatial, window = values.shape[1:-2], table.shape[:-2]
    axes = np.indices(spatial).reshape(len(spatial), -1)
    at = axes[:, None] - axes[:, :, None] + np.array(window)[:, None, None] // 2
    inside = ((at >= 0) & (at < np.array(window)[:, None, None])).all(0)
    pairs = table[tuple(np.where(inside, a, 0) for a in at)]
    pairs = jnp.where(inside[..., None, None], pairs, 0)
    lambdas = jnp.einsum(
        "nmku,bmuv->bnkv", pairs, values.reshape(len(values), -1, *values.shape[-2:])
    )
    return lambdas.reshape(len(values), *spatial, *lambdas.shape[2:])


def apply_lambdas_reference(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Computes `apply_lambdas` from an array of all lambdas, `(batch, *spatial, k, v)`."""
    queries, keys, values, table, bias = floating((queries, keys, values, table, bias))
    content = content_lambdas(normalize_keys(keys), values)
    space = tuple(range(1, queries.ndim - 2))
    lambdas = jnp.expand_dims(content, space) + position_lambdas_reference(values, table)
    if bias is not None:
        lambdas += bias.reshape((1,) * (lambdas.ndim - 2) + (-1, 1))
    return jnp.einsum("b...hk,b...kv->b...hv", queries, lambdas)


def apply_lambdas(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    bias: jax.Array | None = None,
    *,
    method: str = "auto",
) -> jax.Array:
    """Multiplies every query by the content lambda and by the lambda of its position.

    The method `fft`, which `auto` takes for large maps on a GPU, has gradients but no forward mode,
    `jax.jvp` and `jax.linearize`. The others have both.

    Args:
      queries: `(batch, *spatial, heads, k)` with 1 or 2 spatial axes.
      keys: `(batch, *spatial, u, k)`; their softmax over the positions is taken here.
      values: `(batch, *spatial, u, v)`. The heads share keys and values.
      table: `(*window, k, u)`, odd numbers of relative positions; the one in the middle is a
        position's relation to itself.
      bias: `(k,)`, added to every λ.
      method: one of `METHODS`.

    Returns:
      `(batch, *spatial, heads, v)` in the dtype of `queries`.

    Raises:
      ValueError: for an unknown method, or shapes that do not fit.

    Example:
      >>> queries, keys = jnp.ones((2, 8, 8, 4, 3)), jnp.ones((2, 8, 8, 1, 3))
      >>> values, table = jnp.ones((2, 8, 8, 1, 5)), jnp.ones((15, 15, 3, 1))
      >>> y = apply_lambdas(queries, keys, values, table)
      >>> y.shape
      (2, 8, 8, 4, 5)
      >>> print(y[0, 0, 0, 0, 0].round(2))  # 3 keys times a mean of 1 and a sum of 64
      195.0

    Source: Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", 2021.
    """
    _check(queries, keys, values, table, bias, method)
    queries, keys, values, table, bias = floating((queries, keys, values, table, bias))
    content = content_lambdas(normalize_keys(keys), values)
    if bias is not None:
        content += bias.astype(content.dtype)[None, :, None]
    flat = queries.reshape(queries.shape[0], -1, *queries.shape[-2:])
    by_content = jnp.einsum("bnhk,bkv->bnhv", flat, content.astype(queries.dtype))
    by_position = apply_position_lambdas(queries, values, table, method=method)
    return by_content.reshape(by_position.shape) + by_position


def apply_position_lambdas(
    queries: jax.Array, values: jax.Array, table: jax.Array, *, method: str = "auto"
) -> jax.Array:
    """Multiplies every query by the lambda of its position: `(batch, *spatial, heads, v)`.

    The arguments are those of `apply_lambdas`.
    """
    queries, values, table = floating((queries, values, table))
    spatial, dtype = values.shape[1:-2], queries.dtype
    table, values = table.astype(dtype), values.astype(dtype)
    for axis, n in enumerate(spatial):
        table = _crop_window(table, 2 * n - 1, axis)
    if method == "auto":
        method = _select_method(values, table)
    if method == "rows":
        return _apply_by_rows(queries, values, table)
    if method != "spectra":
        return _apply_by_spectra(queries, values, table, method).astype(dtype)
    return by_platform(
        lambda platform: "fft" if platform == "gpu" else "dft",
        lambda name: functools.partial(_apply_by_spectra, method=name),
        *(queries, values, table),
    ).astype(dtype)


def _select_method(values: jax.Array, table: jax.Array) -> str:
    batch, *spatial, depth, features = values.shape
    batch = 1 if export.is_symbolic_dim(batch) else batch  # a batch of unknown size
    # The Toeplitz matrices must not take more memory than all lambdas would.
    rows, columns = min(len(table), 2 * spatial[0] - 1), math.prod(spatial[1:])
    matrices, lambdas = rows * columns**2 * depth, batch * math.prod(spatial) * features
    if spatial[0] <= MAX_ROWS and matrices <= lambdas:
        return "rows"
    return "spectra"


def _apply_by_rows(queries: jax.Array, values: jax.Array, table: jax.Array) -> jax.Array:
    """Computes one row of the map after the other; each position of a sequence is a row."""
    shape = (*queries.shape[:-1], values.shape[-1])
    if queries.ndim == 4:
        queries, values, table = queries[:, :, None], values[:, :, None], table[:, None]
    width = values.shape[2]
    starts, rows, values, table = _row_windows(values, table)
    matrices = _toeplitz(_resize_window(table, 2 * width - 1, 1), width)
    values = jnp.moveaxis(values, -1, 1)

    @jax.checkpoint
    def row(values, matrices, starts, queries):
        matrices = jax.lax.dynamic_slice_in_dim(matrices, starts[0], rows)
        values = jax.lax.dynamic_slice_in_dim(values, starts[1], rows, axis=2)
        lambdas = jnp.einsum("bvrmu,rmunk->bvnk", values, matrices)
        return jnp.einsum("bnhk,bvnk->bnhv", queries, lambdas)

    out = jax.lax.map(
        lambda each: row(values, matrices, *each), (starts, jnp.moveaxis(queries, 1, 0))
    )
    return jnp.moveaxis(out, 0, 1).reshape(shape)


def _row_windows(
    values: jax.Array, table: jax.Array
) -> tuple[np.ndarray, int, jax.Array, jax.Array]:
    """Finds the rows of the table and of the values that each row of the map multiplies.

    A table with fewer rows than the map slides along the values, which are padded with zeros. Any
    other table is cropped or padded to `2 height - 1` rows, and the values slide along it.

    Returns:
      The first rows `(height, 2)` in the table and in the values, the number of rows, the padded
      values and the table.
    """
    height, window = values.shape[1], len(table)
    row = np.arange(height)
    if window < height:
        margins = [(0, 0)] * values.ndim
        margins[1] = (window // 2, window // 2)
        return np.stack([0 * row, row], 1), window, jnp.pad(values, margins), table
    starts = np.stack([height - 1 - row, 0 * row], 1)
    return starts, height, values, _resize_window(table, 2 * height - 1, 0)


def _toeplitz(table: jax.Array, width: int) -> jax.Array:
    """Makes Toeplitz matrices `table[:, m - n + width - 1]`, `(rows, m, u, n, k)`.

    The table is `(rows, 2 width - 1, k, u)`.
    """
    # A sequence of period 2 width, cut into rows of 2 width - 1, shifts by one from row to row.
    backwards = jnp.transpose(jnp.flip(table, 1), (0, 3, 2, 1))
    row = jnp.pad(backwards, [(0, 0), (0, 0), (0, 0), (0, 1)])
    rows = jnp.tile(row, width)[..., : width * (2 * width - 1)]
    matrices = rows.reshape(*row.shape[:3], width, 2 * width - 1)[..., width - 1 :]
    return jnp.transpose(matrices, (0, 3, 1, 4, 2))


def _apply_by_spectra(
    queries: jax.Array, values: jax.Array, table: jax.Array, method: str
) -> jax.Array:
    """Multiplies spectra, for as many keys at once as `SPECTRA_BYTES` allows."""
    shape = (*queries.shape[:-1], values.shape[-1])
    batch, *spatial, depth, features = values.shape
    wide = at_least_float32(queries.dtype)
    d = len(spatial)
    # From here on arrays are (…, *spatial), with batch and features in one axis.
    maps = jnp.moveaxis(values.astype(wide), (-2, -1), (0, 2)).reshape(depth, -1, *spatial)
    table = jnp.moveaxis(jnp.flip(table.astype(wide), range(d)), (-2, -1), (0, 1))
    queries = jnp.moveaxis(queries.astype(wide).reshape(batch, -1, *queries.shape[-2:]), -1, 0)
    transform = _make_transform(method, spatial, table.shape[2:])
    spectrum = transform.forward(maps, all_positions(maps))
    wanted = [range(t // 2, t // 2 + n) for n, t in zip(spatial, table.shape[2:], strict=True)]

    def part(queries, table):
        flat = table.reshape(-1, 1, *table.shape[2:])
        response = transform.forward(flat, all_positions(flat))
        response = Spectrum(*(a.reshape(len(table), depth, *a.shape[2:]) for a in response))
        lambdas = transform.inverse(_multiply_spectra(response, spectrum), wanted)
        return jnp.einsum(
            "kbnh,kbvn->bnhv", queries, lambdas.reshape(len(table), batch, features, -1)
        )

    at_once = _keys_per_chunk(len(table), 2 * maps[0].size * 2**d * jnp.dtype(wide).itemsize)
    return _sum_over_chunks(part, (queries, table), at_once).reshape(shape)


def _multiply_spectra(response: Spectrum, maps: Spectrum) -> Spectrum:
    """Multiplies `(k, u)` by `(u, maps)` at each frequency.

    The gradients of `einsum` are matrix products too. Sums over leading axes would be slow.
    """
    f = "xyz"[: maps.real.ndim - 2]

    def product(a, b):
        return jnp.einsum(f"ku{f},um{f}->km{f}", a, b, precision=jax.lax.Precision.HIGHEST)

    (ar, ai), (br, bi) = response, maps
    return Spectrum(product(ar, br) - product(ai, bi), product(ar, bi) + product(ai, br))


def _make_transform(method: str, spatial: Sequence[int], window: Sequence[int]) -> Transform:
    """Makes a transform long enough that no wanted position is reached by wrapping around."""
    lengths = [n + t // 2 for n, t in zip(spatial, window, strict=True)]
    if method == "fft":
        return FFT(lengths)
    long = len(lengths) == 1 and lengths[0] > DENSE_UP_TO
    return LongDFT(lengths) if long else DFT(lengths)


def _keys_per_chunk(keys: int, bytes_each: int) -> int:
    """Returns the largest divisor of `keys` within `SPECTRA_BYTES`; 1 for an unknown batch."""
    if export.is_symbolic_dim(bytes_each):
        return 1
    fitting = max(1, SPECTRA_BYTES // bytes_each)
    return max(n for n in range(1, keys + 1) if keys % n == 0 and n <= fitting)


def _sum_over_chunks(part, arrays: tuple[jax.Array, ...], at_once: int) -> jax.Array:
    """Sums `part` over chunks of the arrays, each of `at_once` entries of their first axis."""
    parts = len(arrays[0]) // at_once
    if parts == 1:
        return part(*arrays)
    part = jax.checkpoint(part)
    cut = [a.reshape(parts, at_once, *a.shape[1:]) for a in arrays]
    like = jax.eval_shape(part, *(a[0] for a in cut))
    zeros = match_varying_axes(jnp.zeros(like.shape, like.dtype), *arrays)[0]
    return jax.lax.scan(lambda total, each: (total + part(*each), None), zeros, tuple(cut))[0]


def _resize_window(table: jax.Array, window: int, axis: int) -> jax.Array:
    """Crops the table to a window around its middle, or pads it with zeros to that size."""
    table = _crop_window(table, window, axis)
    margins = [(0, 0)] * table.ndim
    margins[axis] = ((window - table.shape[axis]) // 2,) * 2
    return jnp.pad(table, margins)


def _crop_window(table: jax.Array, window: int, axis: int) -> jax.Array:
    """Crops the table to at most `window` positions around its middle."""
    start = max(0, (table.shape[axis] - window) // 2)
    return jax.lax.slice_in_dim(table, start, table.shape[axis] - start, axis=axis)


def _check(queries, keys, values, table, bias, method) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    maps, k, u = queries.shape[:-2], queries.shape[-1], values.shape[-2]
    if (
        queries.ndim not in (4, 5)
        or keys.shape != (*maps, u, k)
        or values.shape[:-2] != maps
        or table.ndim != queries.ndim - 1
        or table.shape[-2:] != (k, u)
        or any(n % 2 == 0 for n in table.shape[:-2])
        or not (bias is None or bias.shape == (k,))
    ):
        raise ValueError(
            "expected queries (batch, 1 or 2 spatial axes, heads, k), keys (…, u, k), values"
            " (…, u, v), table (odd window per axis, k, u) and bias (k,), got"
            f" {queries.shape}, {keys.shape}, {values.shape}, {table.shape} and"
            f" {None if bias is None else bias.shape}"
        )
