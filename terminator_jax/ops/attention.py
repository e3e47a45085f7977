"""Attention of every position of a map to those around it, or to all.

`local_attention` computes it in tiles: some rows and columns of queries at once meet the keys
around them in one matrix product, as large as it has to be to reach them all. Nothing is gathered
position by position. The gradient computes weights again, tile by tile, unless a position has no
more of them than features. `attention_reference` is the definition that it is tested against.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops.channels_first import match_varying_axes
from terminator_jax.ops.dtypes import at_least_float32

# Keys of a tile are taken in whole multiples of so many columns: the products run faster.
COLUMNS = 8
# Queries in a tile at most.
QUERIES = 256
# What reading a tile's keys costs, and more than one of them, in products with a query.
OVERHEAD = 64
# In place of minus infinity, whose differences are not numbers.
HIDDEN = -1e30


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Each position's mean of the values around it, weighted by `softmax(q·k / √features)`.

    Args:
      q: `(batch, rows, columns, heads, features)`.
      k: as q.
      v: as q; where it is the very array k, less is read and computed.
      window: how many rows and columns away a position sees, so that there are `(2 window + 1)²`
        of them, less at the border; None for all.
      mask: bool, `(batch, rows, columns)`, False where there is nothing to be seen; None if there
        is something everywhere.

    Returns:
      As q; 0 where a position sees nothing. Weights are computed in float32 or wider.

    Raises:
      ValueError: if shapes do not fit, or the window is negative.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1, 1)
      >>> print(local_attention(0 * x, x, x, 1)[0, :, :, 0, 0])
      [[2.  2.5 3. ]
       [3.5 4.  4.5]
       [5.  5.5 6. ]]
    """
    check(q, k, v, window, mask)
    rows, columns = q.shape[1:3]
    tiles = best_tiles(rows, columns, max(rows, columns) if window is None else window)
    arrays = [jnp.moveaxis(x, 3, 1) for x in ((q, k) if v is k else (q, k, v))]
    masks = [] if mask is None else [mask[:, None, :, :, None]]
    q, *rest = match_varying_axes(*arrays, *masks)
    kv = tuple(rest[: len(arrays) - 1])
    return jnp.moveaxis(_attention(tiles, q, kv, *rest[len(kv) :]), 1, 3)


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The definition of `local_attention`: all positions with all, those too far away masked."""
    check(q, k, v, window, mask)
    batch, rows, columns, _, features = q.shape
    flat = [x.reshape(batch, rows * columns, *x.shape[3:]) for x in (q, k, v)]
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    reach = max(rows, columns) if window is None else window
    near = [jnp.abs(axis[:, None] - axis[None]) <= reach for axis in (row, column)]
    seen = (near[0] & near[1])[None, None]
    if mask is not None:
        seen = seen & mask.reshape(batch, 1, 1, rows * columns)
    scores = jnp.einsum("bqhd,bkhd->bhqk", *flat[:2]) / math.sqrt(features)
    weights = jax.nn.softmax(jnp.where(seen, scores, HIDDEN), axis=-1)
    weights = jnp.where(seen, weights, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, flat[2]).reshape(q.shape)


def rotary(x: jax.Array, base: float = 100.0) -> jax.Array:
    """Turns the first half of the channels by each position's row, the second by its column.

    A product of a query and a key turned so depends on how far apart they are, not on where. Of a
    half of `2 n` channels, the pair (i, n + i) turns by `base^(-i / n)` rad per row or column.

    Args:
      x: `(batch, rows, columns, heads, features)`, features divisible by 4.
      base: about how many positions the slowest pair takes to turn by one rad.

    Returns:
      As x. Angles are computed in float32 or wider.

    Raises:
      ValueError: if the features do not divide by 4.

    Example:
      >>> x = jnp.ones((1, 2, 2, 1, 4))
      >>> [f"{value:.2f}" for value in rotary(x)[0, 1, 0, 0]]
      ['-0.30', '1.38', '1.00', '1.00']

    Source: Su et al., "RoFormer", 2021, in two dimensions.
    """
    if x.ndim != 5 or x.shape[-1] % 4:
        raise ValueError(
            "rotary needs (batch, rows, columns, heads, features) with features divisible by 4, got"
            f" {x.shape}"
        )
    wide = at_least_float32(x.dtype)
    pairs = x.shape[-1] // 4
    speeds = jnp.asarray(base, wide) ** (-jnp.arange(pairs, dtype=wide) / pairs)
    turned = []
    for axis, half in zip((1, 2), jnp.split(x.astype(wide), 2, axis=-1), strict=True):
        angles = jnp.arange(x.shape[axis], dtype=wide)[:, None] * speeds[None]
        angles = angles.reshape([x.shape[a] if a == axis else 1 for a in range(4)] + [pairs])
        sine, cosine = jnp.sin(angles), jnp.cos(angles)
        a, b = jnp.split(half, 2, axis=-1)
        turned += [a * cosine - b * sine, a * sine + b * cosine]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def check(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, mask: jax.Array | None
) -> None:
    """Raises ValueError if these do not fit each other."""
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "expected q, k and v of one shape (batch, rows, columns, heads, features), got"
            f" {q.shape}, {k.shape} and {v.shape}"
        )
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 or more, or None for all positions, got {window}")
    if mask is not None and (mask.shape != q.shape[:3] or mask.dtype != bool):
        raise ValueError(
            f"expected a mask of bool {q.shape[:3]} for q {q.shape}, got {mask.dtype} {mask.shape}"
        )


class Tiles(NamedTuple):
    """How a map's queries are cut up, and which keys each part of them meets.

    Attributes:
      rows: of the map.
      columns: of the map.
      window: how many rows and columns away a position sees.
      height: rows of queries in a tile.
      width: columns of queries in a tile.
    """

    rows: int
    columns: int
    window: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along each axis; the last may reach over the map's end."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns of the keys that a tile meets."""
        columns = -(-(self.width + 2 * self.window) // COLUMNS) * COLUMNS
        return min(self.rows, self.height + 2 * self.window), min(self.columns, columns)

    @property
    def cost(self) -> int:
        """Of all tiles, in products of a query and a key."""
        queries, keys = self.height * self.width, math.prod(self.reach)
        return math.prod(self.grid) * (queries + OVERHEAD) * keys

    def corners(self, n: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Row and column of the first query of tile n, and of the first key that it meets.

        Keys begin within the map, also where a tile looks over its border.
        """
        first = (n // self.grid[1] * self.height, n % self.grid[1] * self.width)
        axes = zip(first, (self.rows, self.columns), self.reach, strict=True)
        return first, tuple(jnp.clip(at - self.window, 0, size - keys) for at, size, keys in axes)

    def near(self, n: jax.Array) -> jax.Array:
        """Which keys are in the window of which queries of tile n, `(queries, keys)`."""
        axes = zip(*self.corners(n), (self.height, self.width), self.reach, strict=True)
        row, column = (
            jnp.abs((q + jnp.arange(queries))[:, None] - (k + jnp.arange(keys))[None])
            <= self.window
            for q, k, queries, keys in axes
        )
        both = row[:, None, :, None] & column[None, :, None, :]
        return both.reshape(self.height * self.width, math.prod(self.reach))


@functools.lru_cache
def best_tiles(rows: int, columns: int, window: int) -> Tiles:
    """The tiles that cost least.

    Example:
      >>> best_tiles(32, 32, 3).grid, best_tiles(32, 32, 3).reach
      ((4, 4), (14, 16))
    """
    return min(
        (
            Tiles(rows, columns, window, height, width)
            for height in range(1, min(rows, QUERIES) + 1)
            for width in range(1, min(columns, QUERIES // height) + 1)
        ),
        key=lambda tiles: tiles.cost,
    )


# In what follows, arrays are (batch, heads, rows, columns, features), those of a tile (batch,
# heads, positions, features), and its scores (batch, heads, queries, keys). `kv` holds keys and
# values, or one array that is both.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    tiles: Tiles, q: jax.Array, kv: tuple[jax.Array, ...], mask: jax.Array | None = None
) -> jax.Array:
    return _forward(tiles, q, kv, mask)[0]


def _forward(tiles, q, kv, mask=None):
    whole, keeps = _whole_tiles(tiles, q), _keeps_weights(tiles, q)

    def tile(out, n):
        first, reached = tiles.corners(n)
        keys, values = (_cut(x, reached, tiles.reach) for x in (kv[0], kv[-1]))
        scores, seen = _scores(tiles, n, _cut(whole, first, _size(tiles)), keys, mask)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - largest), 0)
        total = jnp.sum(weights, -1, keepdims=True)
        total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        own = _product("bhqk,bhkd->bhqd", weights.astype(q.dtype), values) / total
        out = _placed(out, own.astype(q.dtype), first, _size(tiles))
        return out, weights / total if keeps else largest + jnp.log(total)

    out, kept = jax.lax.scan(tile, _zeros(whole, q.dtype), jnp.arange(math.prod(tiles.grid)))
    return _within(tiles, out), (q, kv, mask, kept)


def _backward(tiles, residuals, gradient):
    q, kv, mask, kept = residuals
    keeps = _keeps_weights(tiles, q)
    whole = [_whole_tiles(tiles, x) for x in (q, gradient)]

    def tile(carried, tile):
        (whole_dq, sums), (n, own), (first, reached) = carried, tile, tiles.corners(tile[0])
        queries, dout = (_cut(x, first, _size(tiles)) for x in whole)
        keys, values = (_cut(x, reached, tiles.reach) for x in (kv[0], kv[-1]))
        weights = own if keeps else _weights(tiles, n, queries, keys, mask, own)
        dweights = _product("bhqd,bhkd->bhqk", dout, values)
        dscores = weights * (dweights - jnp.sum(weights * dweights, -1, keepdims=True))
        dscores = (dscores / math.sqrt(q.shape[-1])).astype(q.dtype)
        dq = _product("bhqk,bhkd->bhqd", dscores, keys)
        dk = _product("bhqk,bhqd->bhkd", dscores, queries)
        dv = _product("bhqk,bhqd->bhkd", weights.astype(q.dtype), dout)
        both = (dk, dv) if len(kv) == 2 else (dk + dv,)
        sums = [_added(s, d, reached, tiles.reach) for s, d in zip(sums, both, strict=True)]
        return (_placed(whole_dq, dq.astype(q.dtype), first, _size(tiles)), sums), None

    wide = at_least_float32(q.dtype)
    carried = _zeros(whole[0], q.dtype), [_zeros(x, wide) for x in kv]
    (dq, dkv), _ = jax.lax.scan(tile, carried, (jnp.arange(math.prod(tiles.grid)), kept))
    return _within(tiles, dq), tuple(d.astype(q.dtype) for d in dkv), None


_attention.defvjp(_forward, _backward)


def _keeps_weights(tiles: Tiles, q: jax.Array) -> bool:
    """Whether the gradient finds a tile's weights kept: where they are no more than its queries.

    Else it finds the logarithms of their sums, and computes them again.
    """
    return math.prod(tiles.reach) <= q.shape[-1]


def _weights(tiles, n, queries, keys, mask, total):
    """The weights of tile n again, from the logarithms of their sums."""
    scores, seen = _scores(tiles, n, queries, keys, mask)
    return jnp.where(seen, jnp.exp(scores - total), 0)


def _scores(tiles, n, queries, keys, mask):
    """The scores of tile n in float32 or wider, and which keys are seen."""
    seen = tiles.near(n)[None, None]
    if mask is not None:
        there = _cut(mask, tiles.corners(n)[1], tiles.reach)
        seen = seen & jnp.swapaxes(there, 2, 3)
    scores = _product("bhqd,bhkd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    return jnp.where(seen, scores, HIDDEN), seen


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` with sums in float32 or wider."""
    return jnp.einsum(formula, a, b, preferred_element_type=at_least_float32(a.dtype))


def _zeros(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns zeros of the shape and the sharding of `x`, which jax 0.12's `zeros_like` forgets."""
    return jnp.where(False, x, 0).astype(dtype)


def _size(tiles: Tiles) -> tuple[int, int]:
    return tiles.height, tiles.width


def _cut(x: jax.Array, corner: tuple[jax.Array, ...], size: tuple[int, int]) -> jax.Array:
    """A part of the map, its positions one after the other."""
    part = jax.lax.dynamic_slice(x, (0, 0, *corner, 0), (*x.shape[:2], *size, x.shape[-1]))
    return part.reshape(*x.shape[:2], math.prod(size), x.shape[-1])


def _placed(
    x: jax.Array, part: jax.Array, corner: tuple[jax.Array, ...], size: tuple[int, int]
) -> jax.Array:
    """The map with `part` in place of what `_cut` would take from it."""
    part = part.reshape(*x.shape[:2], *size, x.shape[-1])
    return jax.lax.dynamic_update_slice(x, part, (0, 0, *corner, 0))


def _added(
    x: jax.Array, part: jax.Array, corner: tuple[jax.Array, ...], size: tuple[int, int]
) -> jax.Array:
    """The map with what `_cut` took from it increased by `part`."""
    return _placed(x, _cut(x, corner, size) + part, corner, size)


def _whole_tiles(tiles: Tiles, x: jax.Array) -> jax.Array:
    """The map with zeros at its end where the last tiles reach over it."""
    sizes = zip(tiles.grid, _size(tiles), x.shape[2:4], strict=True)
    margins = [(0, count * size - have) for count, size, have in sizes]
    return jnp.pad(x, [(0, 0), (0, 0), *margins, (0, 0)])


def _within(tiles: Tiles, x: jax.Array) -> jax.Array:
    """The map without what the last tiles reach over."""
    return x[:, :, : tiles.rows, : tiles.columns]
