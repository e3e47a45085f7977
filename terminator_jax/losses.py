"""The losses of the Terminator: label smoothing, the slow neural loss, a penalty on norms."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import at_least_float32

# The parameters in the norm penalty of the Terminator: a pattern of the parameter's path, whether
# `slow_scale` applies (slow networks and recursive gated units), and the number of leading axes
# that stack several tensors. Each of these tensors has a norm of its own.
PENALIZED = (
    (r"\.(mixer|bottleneck)\.(kernel|bias)", False, 0),
    (r"\.local\.(mixer_weight|mixer_bias|scalar)", False, 1),
    (r"\.rgu[12]\.[kvqy]\.kernel", True, 0),
    (r"\.(slow_net|hyper_interaction\.spatial)\.out_weight", True, 0),
    (r"\.(slow_net|hyper_interaction\.spatial)\.(gabor_weight|weight)", True, 1),
    (r"\.local\.slow_nets\.(out_weight|reduce_weight|mix_weight)", True, 1),
    (r"\.local\.slow_nets\.(gabor_weight|weight|context_weight)", True, 2),
)


def _at_least_float32(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype))


def label_smoothing(
    logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, epsilon: float = 0.09
) -> jax.Array:
    r"""Computes the cross-entropy with labels that are smoothed by `epsilon`.

    .. math:: (1-ε) \cdot (-\log p_{label}) + \frac{ε}{C} \sum_c -\log p_c

    Args:
        logits: `(..., classes)`; reduced precision is computed in float32.
        labels: `(...)` integers in `[0, classes)`. A label above that range gives NaN. Or the
            probabilities of the classes, as the logits `(..., classes)`, whose sum is 1.
        epsilon: the probability that is spread evenly over the classes, in [0, 1].

    Returns:
        The mean over the batch, a scalar.

    Raises:
        TypeError: if the labels are neither integers nor floats.
        ValueError: if the shapes do not fit or `epsilon` is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from terminator_jax.losses import label_smoothing
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> print(f"{label_smoothing(logits, jnp.array([0, 1]), epsilon=0.09):.4f}")
        0.4855
        >>> soft = jnp.array([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]])
        >>> print(f"{label_smoothing(logits, soft, epsilon=0.09):.4f}")
        0.7130

    References:
        Szegedy et al, `Rethinking the Inception Architecture for Computer Vision
        <https://arxiv.org/abs/1512.00567>`_, 2015
    """
    logits, labels = _at_least_float32(logits), jnp.asarray(labels)
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    if not soft and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers or probabilities, got {labels.dtype}")
    if logits.ndim == 0 or (logits.shape if soft else logits.shape[:-1]) != labels.shape:
        then = "" if soft else " and then one axis of classes"
        raise ValueError(
            f"logits must have the labels' shape{then}, "
            f"got logits {logits.shape} and labels {labels.shape}"
        )
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    log_p = jax.nn.log_softmax(logits)
    if soft:
        chosen = jnp.sum(labels.astype(log_p.dtype) * log_p, axis=-1)
    else:
        chosen = jnp.take_along_axis(log_p, labels[..., None], axis=-1)
    return -(1 - epsilon) * jnp.mean(chosen) - epsilon * jnp.mean(log_p)


def slow_neural(
    hyper_kernels: Sequence[jax.typing.ArrayLike],
    factors: Sequence[int],
    channel_sum: bool = False,
) -> jax.Array:
    r"""Computes the slow neural loss: distances between the blocks' hyper-kernels.

    .. math:: \sum_{j<i} \operatorname{mean} \left(\operatorname{tile}(K_j) - K_i\right)^2

    where `jnp.tile` repeats the channels of `K_j` to the number of channels of `K_i`.

    Args:
        hyper_kernels: one for each block, `(*size, channels)`, all of one size.
        factors: the factor of each block's channels. The last block's may be left out.
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
    """Computes mean((tile(narrow) - wide)²): tiled channel c is narrow's c mod its channels."""
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
    """Computes the Euclidean norm of all of `x`, with gradient 0 where `x` is 0.

    The gradient of `jnp.linalg.norm` is NaN there, and many biases start at 0.

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
    """Computes the square root of each entry, with gradient 0 where that is 0."""
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def l2(params, scale: float = 5e-5, slow_scale: float = 1e-6) -> jax.Array:
    r"""Computes the Terminator's penalty on the norms (not their squares) of some of its tensors.

    .. math:: s \left(\sum_\text{mixers, bottlenecks} \|θ\|
        + s_\text{slow} \sum_\text{slow networks, RGUs} \|W\|\right)

    All tensors of the mixers, the bottlenecks, the local mixers and the local scalars count. Of the
    slow networks over the data's axes and of the recursive gated units, only the weights count.

    Args:
        params: the parameters of a model that holds SFNE blocks, e.g. `nnx.state(model, nnx.Param)`
            or the same as a pure dictionary.
        scale: s, a factor on the whole penalty.
        slow_scale: a further factor for the slow networks and the recursive gated units.

    Returns:
        A scalar.

    Raises:
        ValueError: if none of the parameters counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from terminator_jax.losses import l2
        >>> block = {"mixer": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}}
        >>> print(l2({"blocks": [block]}, scale=1.0))
        6.0
    """
    squares, weights = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for pattern, is_slow, num_stacked in PENALIZED:
            if re.search(f"{pattern}(\\.value)?$", name):
                own_axes = tuple(range(num_stacked, leaf.ndim))
                squares.append(jnp.sum(jnp.square(_at_least_float32(leaf)), own_axes).reshape(-1))
                weights += [slow_scale if is_slow else 1.0] * squares[-1].size
    if not squares:
        raise ValueError("none of the parameters belongs to an SFNE block of a Terminator")
    return scale * jnp.sum(_safe_sqrt(jnp.concatenate(squares)) * np.array(weights))
