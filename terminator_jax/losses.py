"""What the Terminator is trained on: label smoothing, slow neural loss, L2 norms."""

import itertools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import at_least_float32

# What the L2 penalty of the Terminator counts: the end of a parameter's path, whether it is slow
# or recursive (and so counts a millionth), and how many leading axes stack tensors in it.
PENALIZED = (
    (r"\.(mixer|bottleneck)\.(kernel|bias)", False, 0),
    (r"\.local\.(mixer_weight|mixer_bias|scalar)", False, 1),
    (r"\.rgu[12]\.[kvqy]\.kernel", True, 0),
    (r"\.(slow_net|hyper_interaction\.spatial)\.out_weight", True, 0),
    (r"\.(slow_net|hyper_interaction\.spatial)\.(gabor_weight|weight)", True, 1),
    (r"\.local\.slow_nets\.(out_weight|reduce_weight|mix_weight)", True, 1),
    (r"\.local\.slow_nets\.(gabor_weight|weight|context_weight)", True, 2),
)

# Numbers that are summed together at first, of the norms of many tensors.
ROW = 128


def _at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype))


def label_smoothing(
    logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, epsilon: float = 0.09
) -> jax.Array:
    r"""Cross-entropy against labels of which a share `epsilon` is spread over all classes.

    .. math:: (1-ε) \cdot (-\log p_{label}) + \frac{ε}{C} \sum_c -\log p_c

    Args:
        logits: `(..., classes)`; reduced precision is computed in float32.
        labels: `(...)` integers in `[0, classes)`. A label above that range gives NaN.
        epsilon: the share spread evenly over the classes, in [0, 1].

    Returns:
        The mean over the batch, a scalar.

    Raises:
        TypeError: if the labels are no integers.
        ValueError: if the shapes do not fit or `epsilon` is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from terminator_jax.losses import label_smoothing
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> print(f"{label_smoothing(logits, jnp.array([0, 1]), epsilon=0.09):.4f}")
        0.4855

    References:
        Szegedy et al, `Rethinking the Inception Architecture for Computer Vision
        <https://arxiv.org/abs/1512.00567>`_, 2015
    """
    logits, labels = _at_least_float32(logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits must have the labels' shape and then one axis of classes, "
            f"got logits {logits.shape} and labels {labels.shape}"
        )
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, labels[..., None], axis=-1)
    return -(1 - epsilon) * jnp.mean(chosen) - epsilon * jnp.mean(log_p)


def slow_neural(
    hyper_kernels: Sequence[jax.typing.ArrayLike],
    factors: Sequence[int],
    channel_sum: bool = False,
) -> jax.Array:
    r"""Slow neural loss: draws each block's hyper-kernel towards those of the blocks before it.

    .. math:: \sum_{j<i} \operatorname{mean} \left(\operatorname{tile}(K_j) - K_i\right)^2

    where the channels of `K_j` are repeated, as `jnp.tile` does, to the number that `K_i` has.

    Args:
        hyper_kernels: one a block, `(*size, channels)`, all of one size.
        factors: by how much each block multiplies its channels. The last block's may be left out.
        channel_sum: if True, channels are summed first, and nothing is tiled:
            :math:`\sum_{j<i} \operatorname{mean} (\sum_c K_j - \sum_c K_i)^2`, over positions.

    Returns:
        A scalar; 0 for a single block.

    Raises:
        ValueError: if the kernels differ in size, or their channels do not follow the factors.

    Examples:
        >>> import jax.numpy as jnp
        >>> from terminator_jax.losses import slow_neural
        >>> kernels = [jnp.ones((8, 8, 3)), jnp.zeros((8, 8, 12)), jnp.ones((8, 8, 24))]
        >>> print(slow_neural(kernels, factors=(4, 2, 2)))
        2.0

    References:
        Zhang, `HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction
        <https://arxiv.org/abs/2401.17948>`_, 2024
    """
    kernels = [_at_least_float32(kernel) for kernel in hyper_kernels]
    _check_kernels([kernel.shape for kernel in kernels], factors)
    if channel_sum:
        kernels = [kernel.sum(axis=-1, keepdims=True) for kernel in kernels]
    pairs = [(kernels[j], kernels[i]) for i in range(len(kernels)) for j in range(i)]
    return sum((_tiled_difference(*pair) for pair in pairs), jnp.zeros(()))


def _tiled_difference(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    """mean((tile(narrow) - wide)²): tiled channel c is narrow's c mod its channels."""
    tiles = wide.reshape(*narrow.shape[:-1], -1, narrow.shape[-1])
    return jnp.mean(jnp.square(narrow[..., None, :] - tiles))


def _check_kernels(shapes: list[tuple[int, ...]], factors: Sequence[int]) -> None:
    """Raises ValueError unless all sizes agree and channels grow by the factors."""
    if not shapes or len(factors) not in (len(shapes), len(shapes) - 1):
        raise ValueError(
            f"one factor for each block (or for each but the last) is needed, "
            f"got {len(factors)} for {len(shapes)} hyper-kernels"
        )
    for before, after, factor in zip(shapes, shapes[1:], factors, strict=False):
        if after != (*before[:-1], before[-1] * factor):
            raise ValueError(
                f"a hyper-kernel {before} and factor {factor} ask for "
                f"{(*before[:-1], before[-1] * factor)} next, got {after}"
            )


def safe_norm(x: jax.typing.ArrayLike) -> jax.Array:
    """Euclidean norm of all of `x`, with gradient 0 where `x` is 0.

    A plain `jnp.linalg.norm` has a gradient of NaN there, and many biases start at 0.

    Args:
        x: any shape; reduced precision is computed in float32.

    Returns:
        A scalar.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from terminator_jax.losses import safe_norm
        >>> print(safe_norm(jnp.array([3.0, 4.0])), jax.grad(safe_norm)(jnp.zeros(2)))
        5.0 [0. 0.]
    """
    return _safe_sqrt(jnp.sum(jnp.square(_at_least_float32(x))))


def _safe_sqrt(square: jax.Array) -> jax.Array:
    """The root of each entry, with gradient 0 where that is 0."""
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def l2(
    params,
    scale: float = 5e-5,
    slow_scale: float = 1e-6,
    *,
    packed: tuple[jax.typing.ArrayLike, Sequence[int]] | None = None,
) -> jax.Array:
    r"""The Terminator's penalty on the norms (not their squares) of some of its tensors.

    .. math:: s \left(\sum_\text{mixers, bottlenecks} \|θ\|
        + s_\text{slow} \sum_\text{slow networks, RGUs} \|W\|\right)

    Every tensor of the mixers, the bottlenecks, the local mixers and the local scalars counts; of
    the slow networks over the data's axes and of the recursive gated units the pointwise weights.

    Args:
        params: the parameters of a model that holds SFNE blocks, e.g. `nnx.state(model, nnx.Param)`
            or the same as a pure dictionary.
        scale: s, of the whole.
        slow_scale: of the slow networks and the recursive gated units.
        packed: the same parameters in one vector, and where in it each of them begins. The gradient
            is then that vector's, and of `params` only names and shapes are used: a program
            compiles sooner that does not take the penalty apart by tensors.

    Returns:
        A scalar.

    Raises:
        ValueError: if no parameter is one of those, or `packed` has not as many parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from terminator_jax.losses import l2
        >>> block = {"mixer": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}}
        >>> print(l2({"blocks": [block]}, scale=1.0))
        6.0
    """
    leaves = jax.tree.leaves(params)
    if packed is None:
        starts = np.cumsum([0] + [leaf.size for leaf in leaves])[:-1]
        packed = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]), starts
    vector, starts = packed
    if len(starts) != len(leaves) or vector.shape != (sum(leaf.size for leaf in leaves),):
        raise ValueError(
            f"packed has {len(starts)} parameters and the shape {vector.shape}, params"
            f" {len(leaves)} and {sum(leaf.size for leaf in leaves)} numbers"
        )
    ranges, weights = _penalized(params, starts, slow_scale)
    squares = _sums_of_squares(_at_least_float32(vector), ranges)
    return scale * jnp.sum(_safe_sqrt(squares) * np.array(weights))


def _penalized(
    params, starts: Sequence[int], slow_scale: float
) -> tuple[list[tuple[int, int]], list[float]]:
    """The tensors that the penalty counts: from where to where each lies, and how it counts."""
    ranges, weights = [], []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), start in zip(leaves, starts, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for pattern, slow, stacked in PENALIZED:
            if re.search(f"{pattern}(\\.value)?$", name):
                count = math.prod(leaf.shape[:stacked])
                ends = range(start, start + leaf.size + 1, leaf.size // count)
                ranges += itertools.pairwise(ends)
                weights += [slow_scale if slow else 1.0] * count
    if not ranges:
        raise ValueError("none of the parameters belongs to an SFNE block of a Terminator")
    return ranges, weights


def _sums_of_squares(x: jax.Array, ranges: Sequence[tuple[int, int]]) -> jax.Array:
    """The sum of squares of `x[start:stop]` for each range.

    Range by range, hundreds of them take seconds to compile: here all of `x` is summed in rows, of
    which each range has some in whole and parts of at most two more.
    """
    rows = jnp.pad(x, (0, -len(x) % ROW)).reshape(-1, ROW)
    owners, parts = np.full(len(rows), len(ranges)), []
    for n, (start, stop) in enumerate(ranges):
        first, last = -(-start // ROW), stop // ROW
        owners[first:last] = n
        edges = [(start, min(stop, first * ROW)), (last * ROW, stop)]
        # Within one row, the range is its own only edge.
        parts += [(n, *edge) for edge in edges[: 1 if last < first else 2] if edge[0] < edge[1]]
    owner, start, stop = np.array(parts, int).reshape(-1, 3).T
    lanes = np.arange(ROW)
    inside = (lanes >= (start % ROW)[:, None]) & (lanes < (stop - start + start % ROW)[:, None])
    edges = jnp.where(inside, rows[start // ROW], 0)
    sums = jnp.concatenate([jnp.sum(jnp.square(a), axis=1) for a in (rows, edges)])
    owners = np.concatenate([owners, owner])
    return jax.ops.segment_sum(sums, owners, len(ranges) + 1)[:-1]
