"""Lambda layers: the context becomes one linear function per position, which queries meet.

A query is multiplied with a matrix λ `(k, v)`: the content lambda, one for the whole map, plus the
position lambda, one for each position. The latter is a correlation of the values with a table of
relative positions,

    λp[n, k, v] = Σ_{m,u} table[m - n + centre, k, u] values[m, u, v]

with zeros where m lies outside the map. A window of a few positions gives local contexts, one that
reaches from every position to every other, 2 n - 1 wide on an axis of n, gives global ones.

    rows   for one row of the map after the other, a product with the table's rows that it meets,
           each spread out into a matrix from columns to columns
    dft    the correlation as a product of spectra, by transforms that are matrix products
    fft    the same by FFTs
    auto   `rows` for small maps in large batches, else by spectra

All contract with the queries what they have at once, a row or as many of the keys as are allowed,
and compute it again for the gradient: of a large batch, the lambdas of all positions never exist
together. None writes down the table for pairs of positions, of which there are millions; only
`position_lambdas_reference`, the definition that they are tested against, does.
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
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.platform import by_platform

METHODS = ("auto", "rows", "dft", "fft")
# `auto` takes `rows` for maps of up to so many of them.
ROWS_UP_TO = 32
# Of the spectra of lambdas that exist at once; more keys than that follow one another.
SPECTRA_BYTES = 2**24


def normalize_keys(keys: jax.Array) -> jax.Array:
    """Softmax over the positions, in float32 or wider.

    Args:
      keys: `(batch, *spatial, u, k)`.

    Example:
      >>> print(normalize_keys(jnp.zeros((1, 2, 5, 1, 3))).ravel()[0])
      0.1
    """
    wide = keys.astype(at_least_float32(keys.dtype))
    flat = wide.reshape(keys.shape[0], -1, *keys.shape[-2:])
    return jax.nn.softmax(flat, 1).reshape(keys.shape)


def content_lambdas(keys: jax.Array, values: jax.Array) -> jax.Array:
    """`λc[k, v] = Σ_{n,u} keys[n, u, k] values[n, u, v]` of each sample, `(batch, k, v)`.

    Args:
      keys: `(batch, *spatial, u, k)`, normalized.
      values: `(batch, *spatial, u, v)`.
    """
    keys, values = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (keys, values))
    return jnp.einsum("bmk,bmv->bkv", keys, values)


def position_lambdas_reference(values: jax.Array, table: jax.Array) -> jax.Array:
    """The definition: gathers the table for every pair of positions.

    Args:
      values: `(batch, *spatial, u, v)`.
      table: `(*window, k, u)`.

    Returns:
      `(batch, *spatial, k, v)`.
    """
    spatial, window = values.shape[1:-2], table.shape[:-2]
    axes = np.indices(spatial).reshape(len(spatial), -1)
    at = axes[:, None] - axes[:, :, None] + np.array(window)[:, None, None] // 2
    met = ((at >= 0) & (at < np.array(window)[:, None, None])).all(0)
    pairs = table[tuple(np.where(met, a, 0) for a in at)] * met[..., None, None]
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
    """`apply_lambdas` with all the lambdas `(batch, *spatial, k, v)` written out."""
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
    """Every query times the content lambda and the lambda of its position.

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
    content = content_lambdas(normalize_keys(keys), values)
    if bias is not None:
        content += bias.astype(content.dtype)[None, :, None]
    flat = queries.reshape(queries.shape[0], -1, *queries.shape[-2:])
    by_content = jnp.einsum("bnhk,bkv->bnhv", flat, content.astype(queries.dtype))
    by_position = meet_position_lambdas(queries, values, table, method=method)
    return by_content.reshape(by_position.shape) + by_position


def meet_position_lambdas(
    queries: jax.Array, values: jax.Array, table: jax.Array, *, method: str = "auto"
) -> jax.Array:
    """Every query times the lambda of its position, `(batch, *spatial, heads, v)`.

    Arguments as of `apply_lambdas`.
    """
    spatial, dtype = values.shape[1:-2], queries.dtype
    table, values = table.astype(dtype), values.astype(dtype)
    for axis, n in enumerate(spatial):
        table = _cropped(table, 2 * n - 1, axis)
    if method == "auto":
        method = _fastest(values, table)
    if method == "rows":
        return _by_rows(queries, values, table)
    if method != "spectra":
        return _by_spectra(queries, values, table, method).astype(dtype)
    return by_platform(
        lambda platform: "fft" if platform == "gpu" else "dft",
        lambda name: functools.partial(_by_spectra, method=name),
        *(queries, values, table),
    ).astype(dtype)


def _fastest(values: jax.Array, table: jax.Array) -> str:
    batch, *spatial, depth, features = values.shape
    batch = 1 if export.is_symbolic_dim(batch) else batch  # a batch of unknown size
    # The table's rows as matrices must not take more memory than the lambdas that are avoided.
    rows, columns = min(len(table), 2 * spatial[0] - 1), math.prod(spatial[1:])
    matrices, lambdas = rows * columns**2 * depth, batch * math.prod(spatial) * features
    if spatial[0] <= ROWS_UP_TO and matrices <= lambdas:
        return "rows"
    return "spectra"


def _by_rows(queries: jax.Array, values: jax.Array, table: jax.Array) -> jax.Array:
    """A product for each row of the map; the positions of a sequence are rows of one column."""
    shape = (*queries.shape[:-1], values.shape[-1])
    if queries.ndim == 4:
        queries, values, table = queries[:, :, None], values[:, :, None], table[:, None]
    width = values.shape[2]
    starts, rows, values, table = _rows_that_meet(values, table)
    matrices = _matrices(_resized(table, 2 * width - 1, 1), width)
    values = jnp.moveaxis(values, -1, 1)

    @jax.checkpoint
    def row(values, matrices, starts, queries):
        across = jax.lax.dynamic_slice_in_dim(matrices, starts[0], rows)
        met = jax.lax.dynamic_slice_in_dim(values, starts[1], rows, axis=2)
        lambdas = jnp.einsum("bvrmu,rmunk->bvnk", met, across)
        return jnp.einsum("bnhk,bvnk->bnhv", queries, lambdas)

    out = jax.lax.map(
        lambda each: row(values, matrices, *each), (starts, jnp.moveaxis(queries, 1, 0))
    )
    return jnp.moveaxis(out, 0, 1).reshape(shape)


def _rows_that_meet(
    values: jax.Array, table: jax.Array
) -> tuple[np.ndarray, int, jax.Array, jax.Array]:
    """For each row of the map, from which row on the table and the values meet for it.

    Either the table slides along the values, and has the rows for that, or the values, with zeros
    around, slide along the table.

    Returns:
      The starts `(height, 2)` in table and values, how many rows meet, the values and the table.
    """
    height, window = values.shape[1], len(table)
    row = np.arange(height)
    if window < height:
        margins = [(0, 0)] * values.ndim
        margins[1] = (window // 2, window // 2)
        return np.stack([0 * row, row], 1), window, jnp.pad(values, margins), table
    starts = np.stack([height - 1 - row, 0 * row], 1)
    return starts, height, values, _resized(table, 2 * height - 1, 0)


def _matrices(table: jax.Array, width: int) -> jax.Array:
    """`(rows, 2 width - 1, k, u)` to `(rows, m, u, n, k)`: `table[:, m - n + width - 1]`."""
    # Rows of width 2 n - 1 cut out of a repeated row of 2 n: each begins one position further on.
    backwards = jnp.transpose(jnp.flip(table, 1), (0, 3, 2, 1))
    row = jnp.pad(backwards, [(0, 0), (0, 0), (0, 0), (0, 1)])
    rows = jnp.tile(row, width)[..., : width * (2 * width - 1)]
    matrices = rows.reshape(*row.shape[:3], width, 2 * width - 1)[..., width - 1 :]
    return jnp.transpose(matrices, (0, 3, 1, 4, 2))


def _by_spectra(queries: jax.Array, values: jax.Array, table: jax.Array, method: str) -> jax.Array:
    """Products of spectra, for as many keys at once as `SPECTRA_BYTES` lets."""
    shape = (*queries.shape[:-1], values.shape[-1])
    batch, *spatial, depth, features = values.shape
    wide = at_least_float32(queries.dtype)
    d = len(spatial)
    # From here on (…, *spatial), with the maps of the batch side by side.
    maps = jnp.moveaxis(values.astype(wide), (-2, -1), (0, 2)).reshape(depth, -1, *spatial)
    table = jnp.moveaxis(jnp.flip(table.astype(wide), range(d)), (-2, -1), (0, 1))
    queries = jnp.moveaxis(queries.astype(wide).reshape(batch, -1, *queries.shape[-2:]), -1, 0)
    transform = _transform(method, spatial, table.shape[2:])
    spectrum = transform.forward(maps, all_positions(maps))
    wanted = [range(t // 2, t // 2 + n) for n, t in zip(spatial, table.shape[2:], strict=True)]

    def part(queries, table):
        flat = table.reshape(-1, 1, *table.shape[2:])
        response = transform.forward(flat, all_positions(flat))
        response = Spectrum(*(a.reshape(len(table), depth, *a.shape[2:]) for a in response))
        lambdas = transform.inverse(_mixed(response, spectrum), wanted)
        return jnp.einsum(
            "kbnh,kbvn->bnhv", queries, lambdas.reshape(len(table), batch, features, -1)
        )

    at_once = _keys_at_once(len(table), 2 * maps[0].size * 2**d * jnp.dtype(wide).itemsize)
    return _summed(part, (queries, table), at_once).reshape(shape)


def _mixed(response: Spectrum, maps: Spectrum) -> Spectrum:
    """At each frequency the product of `(k, u)` and `(u, maps)`.

    By `einsum`, whose gradients are products again: sums over an array's first axes are slow.
    """
    f = "xyz"[: maps.real.ndim - 2]

    def product(a, b):
        return jnp.einsum(f"ku{f},um{f}->km{f}", a, b, precision=jax.lax.Precision.HIGHEST)

    (ar, ai), (br, bi) = response, maps
    return Spectrum(product(ar, br) - product(ai, bi), product(ar, bi) + product(ai, br))


def _transform(method: str, spatial: Sequence[int], window: Sequence[int]) -> Transform:
    """On circles so long that what wraps around is not wanted."""
    lengths = [n + t // 2 for n, t in zip(spatial, window, strict=True)]
    if method == "fft":
        return FFT(lengths)
    long = len(lengths) == 1 and lengths[0] > DENSE_UP_TO
    return LongDFT(lengths) if long else DFT(lengths)


def _keys_at_once(keys: int, bytes_each: int) -> int:
    """The largest divisor of the number of keys that keeps the bound; 1 for an unknown batch."""
    if export.is_symbolic_dim(bytes_each):
        return 1
    fitting = max(1, SPECTRA_BYTES // bytes_each)
    return max(n for n in range(1, keys + 1) if keys % n == 0 and n <= fitting)


def _summed(part, arrays: tuple[jax.Array, ...], at_once: int) -> jax.Array:
    """`part` of the arrays, summed over so many entries of their first axis at once."""
    parts = len(arrays[0]) // at_once
    if parts == 1:
        return part(*arrays)
    part = jax.checkpoint(part)
    cut = [a.reshape(parts, at_once, *a.shape[1:]) for a in arrays]
    like = jax.eval_shape(part, *(a[0] for a in cut))
    zeros = match_varying_axes(jnp.zeros(like.shape, like.dtype), *arrays)[0]
    return jax.lax.scan(lambda total, each: (total + part(*each), None), zeros, tuple(cut))[0]


def _resized(table: jax.Array, window: int, axis: int) -> jax.Array:
    """The table cut to a window around its middle, or with zeros around it."""
    table = _cropped(table, window, axis)
    margins = [(0, 0)] * table.ndim
    margins[axis] = ((window - table.shape[axis]) // 2,) * 2
    return jnp.pad(table, margins)


def _cropped(table: jax.Array, window: int, axis: int) -> jax.Array:
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
