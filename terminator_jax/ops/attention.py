"""Attention of every position of a map to the positions around it, or to all.

`local_attention` works in tiles. A tile is a block of queries; one matrix product multiplies it
with the block of all keys in its windows. No keys are gathered position by position. The gradient
recomputes the weights tile by tile, unless a position has no more weights than features.
`attention_reference` is the definition for the tests.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops.channels_first import match_varying_axes
from terminator_jax.ops.dtypes import at_least_float32, floating

# The width of a block of keys is a multiple of this: matrix products run faster.
KEY_COLUMN_MULTIPLE = 8
# The largest number of queries in a tile.
MAX_TILE_QUERIES = 256
# The cost of reading one key of a tile, in products of a query and a key.
TILE_OVERHEAD = 64
# The score of a masked pair. Minus infinity would give NaN where all pairs are masked.
MASK_VALUE = -1e30


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Averages the values around each position, with the weights `softmax(q·k / √features)`.

    It has gradients, and gradients of them, but no forward mode: `jax.jvp` and `jax.linearize` need
    `attention_reference`.

    Args:
      q: `(batch, rows, columns, heads, features)`.
      k: as q.
      v: as q. If it is the same array object as k, the function reads and computes less.
      window: the largest distance in rows and in columns that a position attends to, so to
        `(2 window + 1)²` positions, fewer at the border. None for all positions.
      mask: bool, `(batch, rows, columns)`, False for positions that nothing attends to; None if
        all positions count.

    Returns:
      As q; 0 for a position whose window is masked. Weights are computed in float32 or wider.

    Raises:
      ValueError: if shapes do not fit, or the window is negative.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1, 1)
      >>> print(local_attention(0 * x, x, x, 1)[0, :, :, 0, 0])
      [[2.  2.5 3. ]
       [3.5 4.  4.5]
       [5.  5.5 6. ]]
    """
    _check_arguments(q, k, v, window, mask)
    rows, columns = q.shape[1:3]
    tiles = cheapest_tiles(rows, columns, max(rows, columns) if window is None else window)
    arrays = floating((q, k) if v is k else (q, k, v))
    arrays = [jnp.moveaxis(x, 3, 1) for x in arrays]
    masks = [] if mask is None else [mask[:, None, :, :, None]]
    q, *rest = match_varying_axes(*arrays, *masks)
    kv = tuple(rest[: len(arrays) - 1])
    return jnp.moveaxis(_tiled_attention(tiles, q, kv, *rest[len(kv) :]), 1, 3)


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes `local_attention` by its definition: all pairs, those too far apart masked."""
    _check_arguments(q, k, v, window, mask)
    q, k, v = floating((q, k, v))
    batch, rows, columns, _, features = q.shape
    flat = [x.reshape(batch, rows * columns, *x.shape[3:]) for x in (q, k, v)]
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    reach = max(rows, columns) if window is None else window
    close = [jnp.abs(axis[:, None] - axis[None]) <= reach for axis in (row, column)]
    seen = (close[0] & close[1])[None, None]
    if mask is not None:
        seen = seen & mask.reshape(batch, 1, 1, rows * columns)
    scores = jnp.einsum("bqhd,bkhd->bhqk", *flat[:2]) / math.sqrt(features)
    weights = jax.nn.softmax(jnp.where(seen, scores, MASK_VALUE), axis=-1)
    weights = jnp.where(seen, weights, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, flat[2]).reshape(q.shape)


def rotary(x: jax.Array, base: float = 100.0) -> jax.Array:
    """Rotates the first half of the channels by each position's row, the second by its column.

    The product of a rotated query and a rotated key depends on their offset, not on their places.
    In a half of `2 n` channels, the pair (i, n + i) rotates by `base^(-i / n)` rad per row or
    column.

    Args:
      x: `(batch, rows, columns, heads, features)`, features divisible by 4.
      base: the slowest pair takes about so many positions to rotate by one rad.

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
    x = floating(x)
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


def _check_arguments(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, mask: jax.Array | None
) -> None:
    """Raises ValueError unless the shapes, the window and the mask fit each other."""
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
    """Splits a map's queries into tiles, and assigns a block of keys to each tile.

    Attributes:
      rows: rows of the map.
      columns: columns of the map.
      window: the largest distance in rows and in columns that a position attends to.
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
        """The number of tiles along each axis; the last tile may extend past the map."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    @property
    def key_block(self) -> tuple[int, int]:
        """The rows and columns of a tile's block of keys."""
        columns = -(-(self.width + 2 * self.window) // KEY_COLUMN_MULTIPLE) * KEY_COLUMN_MULTIPLE
        return min(self.rows, self.height + 2 * self.window), min(self.columns, columns)

    @property
    def query_block(self) -> tuple[int, int]:
        """The rows and columns of a tile's queries."""
        return self.height, self.width

    @property
    def cost(self) -> int:
        """The cost of all tiles, in products of a query and a key."""
        queries, keys = self.height * self.width, math.prod(self.key_block)
        return math.prod(self.grid) * (queries + TILE_OVERHEAD) * keys

    def block_starts(self, n: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Returns the row and column of the first query of tile n, and those of its first key.

        The block of keys always lies within the map.
        """
        first = (n // self.grid[1] * self.height, n % self.grid[1] * self.width)
        axes = zip(first, (self.rows, self.columns), self.key_block, strict=True)
        return first, tuple(jnp.clip(at - self.window, 0, size - keys) for at, size, keys in axes)

    def window_mask(self, n: jax.Array) -> jax.Array:
        """Marks the keys in the window of each query of tile n, `(queries, keys)`."""
        axes = zip(*self.block_starts(n), (self.height, self.width), self.key_block, strict=True)
        row, column = (
            jnp.abs((q + jnp.arange(queries))[:, None] - (k + jnp.arange(keys))[None])
            <= self.window
            for q, k, queries, keys in axes
        )
        both = row[:, None, :, None] & column[None, :, None, :]
        return both.reshape(self.height * self.width, math.prod(self.key_block))


@functools.lru_cache
def cheapest_tiles(rows: int, columns: int, window: int) -> Tiles:
    """Returns the tiles with the lowest `cost`.

    Example:
      >>> cheapest_tiles(32, 32, 3).grid, cheapest_tiles(32, 32, 3).key_block
      ((4, 4), (14, 16))
    """
    return min(
        (
            Tiles(rows, columns, window, height, width)
            for height in range(1, min(rows, MAX_TILE_QUERIES) + 1)
            for width in range(1, min(columns, MAX_TILE_QUERIES // height) + 1)
        ),
        key=lambda tiles: tiles.cost,
    )


# Below, maps are (batch, heads, rows, columns, features), blocks of a tile (batch, heads,
# positions, features), and scores (batch, heads, queries, keys). `kv` holds keys and values, or
# one array that is both.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_attention(
    tiles: Tiles, q: jax.Array, kv: tuple[jax.Array, ...], mask: jax.Array | None = None
) -> jax.Array:
    """Attends tile by tile; JAX's own gradient would keep the scores of all tiles."""
    return _tiled_attention_fwd(tiles, q, kv, mask)[0]


def _tiled_attention_fwd(tiles, q, kv, mask=None):
    whole, saves_weights = _pad_to_tiles(tiles, q), _saves_weights(tiles, q)

    def tile(out, n):
        query_start, key_start = tiles.block_starts(n)
        keys, values = (_slice_block(x, key_start, tiles.key_block) for x in (kv[0], kv[-1]))
        scores, seen = _masked_scores(
            tiles, n, _slice_block(whole, query_start, tiles.query_block), keys, mask
        )
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(seen, jnp.exp(scores - largest), 0)
        total = jnp.sum(weights, -1, keepdims=True)
        total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        own = _einsum_float32("bhqk,bhkd->bhqd", weights.astype(q.dtype), values) / total
        out = _update_block(out, own.astype(q.dtype), query_start, tiles.query_block)
        return out, weights / total if saves_weights else largest + jnp.log(total)

    out, saved = jax.lax.scan(tile, _zeros_like(whole, q.dtype), jnp.arange(math.prod(tiles.grid)))
    return _crop_to_map(tiles, out), (q, kv, mask, saved)


def _tiled_attention_bwd(tiles, residuals, gradient):
    q, kv, mask, saved = residuals
    saves_weights = _saves_weights(tiles, q)
    whole = [_pad_to_tiles(tiles, x) for x in (q, gradient)]

    def tile(carried, tile):
        (whole_dq, sums), (n, own), (query_start, key_start) = (
            carried,
            tile,
            tiles.block_starts(tile[0]),
        )
        queries, dout = (_slice_block(x, query_start, tiles.query_block) for x in whole)
        keys, values = (_slice_block(x, key_start, tiles.key_block) for x in (kv[0], kv[-1]))
        weights = own if saves_weights else _recompute_weights(tiles, n, queries, keys, mask, own)
        dweights = _einsum_float32("bhqd,bhkd->bhqk", dout, values)
        dscores = weights * (dweights - jnp.sum(weights * dweights, -1, keepdims=True))
        dscores = (dscores / math.sqrt(q.shape[-1])).astype(q.dtype)
        dq = _einsum_float32("bhqk,bhkd->bhqd", dscores, keys)
        dk = _einsum_float32("bhqk,bhqd->bhkd", dscores, queries)
        dv = _einsum_float32("bhqk,bhqd->bhkd", weights.astype(q.dtype), dout)
        both = (dk, dv) if len(kv) == 2 else (dk + dv,)
        sums = [
            _add_to_block(s, d, key_start, tiles.key_block) for s, d in zip(sums, both, strict=True)
        ]
        return (
            _update_block(whole_dq, dq.astype(q.dtype), query_start, tiles.query_block),
            sums,
        ), None

    wide = at_least_float32(q.dtype)
    carried = _zeros_like(whole[0], q.dtype), [_zeros_like(x, wide) for x in kv]
    (dq, dkv), _ = jax.lax.scan(tile, carried, (jnp.arange(math.prod(tiles.grid)), saved))
    return _crop_to_map(tiles, dq), tuple(d.astype(q.dtype) for d in dkv), None


_tiled_attention.defvjp(_tiled_attention_fwd, _tiled_attention_bwd)


def _saves_weights(tiles: Tiles, q: jax.Array) -> bool:
    """Decides whether to save the weights for the gradient, or only the log-sum-exp of the scores.

    The weights are saved if they are no larger than the queries.
    """
    return math.prod(tiles.key_block) <= q.shape[-1]


def _recompute_weights(tiles, n, queries, keys, mask, log_sum_exp):
    """Recomputes the weights of tile n from the log-sum-exp of its scores."""
    scores, seen = _masked_scores(tiles, n, queries, keys, mask)
    return jnp.where(seen, jnp.exp(scores - log_sum_exp), 0)


def _masked_scores(tiles, n, queries, keys, mask):
    """Returns the scores of tile n in float32 or wider, and which pairs are not masked."""
    seen = tiles.window_mask(n)[None, None]
    if mask is not None:
        valid = _slice_block(mask, tiles.block_starts(n)[1], tiles.key_block)
        seen = seen & jnp.swapaxes(valid, 2, 3)
    scores = _einsum_float32("bhqd,bhkd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    return jnp.where(seen, scores, MASK_VALUE), seen


def _einsum_float32(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` of two arrays with sums in float32 or wider."""
    return jnp.einsum(formula, a, b, preferred_element_type=at_least_float32(a.dtype))


def _zeros_like(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns zeros of the shape and the sharding of `x`, which jax 0.12's `zeros_like` forgets."""
    return jnp.where(False, x, 0).astype(dtype)


def _slice_block(x: jax.Array, start: tuple[jax.Array, ...], size: tuple[int, int]) -> jax.Array:
    """Slices a block out of the map and flattens its positions."""
    part = jax.lax.dynamic_slice(x, (0, 0, *start, 0), (*x.shape[:2], *size, x.shape[-1]))
    return part.reshape(*x.shape[:2], math.prod(size), x.shape[-1])


def _update_block(
    x: jax.Array, part: jax.Array, start: tuple[jax.Array, ...], size: tuple[int, int]
) -> jax.Array:
    """Replaces the block that `_slice_block` would return by `part`."""
    part = part.reshape(*x.shape[:2], *size, x.shape[-1])
    return jax.lax.dynamic_update_slice(x, part, (0, 0, *start, 0))


def _add_to_block(
    x: jax.Array, part: jax.Array, start: tuple[jax.Array, ...], size: tuple[int, int]
) -> jax.Array:
    """Adds `part` to the block that `_slice_block` would return."""
    return _update_block(x, _slice_block(x, start, size) + part, start, size)


def _pad_to_tiles(tiles: Tiles, x: jax.Array) -> jax.Array:
    """Pads the map with zeros at its end, so that the tiles cover it exactly."""
    sizes = zip(tiles.grid, tiles.query_block, x.shape[2:4], strict=True)
    margins = [(0, count * size - have) for count, size, have in sizes]
    return jnp.pad(x, [(0, 0), (0, 0), *margins, (0, 0)])


def _crop_to_map(tiles: Tiles, x: jax.Array) -> jax.Array:
    """Removes the padding of `_pad_to_tiles`."""
    return x[:, :, : tiles.rows, : tiles.columns]
