"""The lambda layer: the context becomes linear functions that are applied to the queries."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.batch_norm import batch_norm
from terminator_jax.layers.initializers import normal, uniform
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.lambdas import METHODS, apply_lambdas
from terminator_jax.ops.standardize import AxisName


class LambdaLayer(nnx.Module):
    """Lets every position interact with its context without attention maps.

    `y[n, head] = q[n, head] (λc + λp[n])`. The content lambda λc `(k, v)` is computed from the keys
    and values of the whole map. The position lambda λp is computed from the values and a table of
    relative positions. All heads share keys and values.

    Example:
      >>> x = jnp.ones((2, 8, 8, 12))
      >>> LambdaLayer(12, 24, size=(8, 8), rngs=nnx.Rngs(0))(x).shape  # global
      (2, 8, 8, 24)
      >>> LambdaLayer(12, 24, window=(5, 5), rngs=nnx.Rngs(0))(x).shape  # local
      (2, 8, 8, 24)

    Forward mode, `jax.jvp` and `jax.linearize`, works with every method but `fft`, which `auto`
    takes for large maps on a GPU.

    Queries and values are normalized by `nnx.BatchNorm`: with the statistics of the batch in
    training, with running averages after `eval()`.

    Args:
      inputs: channels of the map.
      outputs: channels of the result, a multiple of the heads.
      size: for a global context: positions of the map per axis, on one or two axes.
      window: for a local context: its odd number of positions per axis. Maps may have any size.
      heads: queries of each position.
      keys: k, channels of a key.
      depth: u, the intra-depth: how many keys and values each position has.
      method: how position lambdas are computed, one of `terminator_jax.ops.lambdas.METHODS`.
      use_running_average: whether the layer starts in evaluation mode.
      dtype: dtype of the computation; statistics and the softmax stay in float32 or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any.
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes that do not fit each other; when called, for a map of another shape.

    Source: Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", 2021.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        size: tuple[int, ...] | None = None,
        window: tuple[int, ...] | None = None,
        heads: int = 4,
        keys: int = 16,
        depth: int = 1,
        method: str = "auto",
        use_running_average: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        _check(outputs, size, window, heads, method)
        self.size = None if size is None else tuple(size)
        self.inputs, self.heads, self.keys, self.depth = inputs, heads, keys, depth
        self.method = method
        table_size = tuple(2 * n - 1 for n in size) if window is None else tuple(window)
        values = depth * (outputs // heads)

        def linear(features):
            return nnx.Linear(
                inputs, features, use_bias=False, kernel_init=normal(1 / math.sqrt(inputs)),
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm(features):
            return batch_norm(
                features, use_running_average=use_running_average, axis_name=axis_name,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.to_q, self.to_k, self.to_v = map(linear, (heads * keys, depth * keys, values))
        self.norm_q, self.norm_v = norm(heads * keys), norm(values)
        # As in the sources: a table of embeddings, or a convolution with a bias.
        init = uniform(1 / math.sqrt(depth * math.prod(table_size))) if window else normal(1.0)
        self.table = nnx.Param(init(rngs.params(), (*table_size, keys, depth), param_dtype))
        self.bias = nnx.Param(jnp.zeros(keys, param_dtype)) if window else None

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Maps `(batch, *spatial, inputs)` to `(batch, *spatial, outputs)`.

        `use_running_average` overrides the mode that `train()` and `eval()` set.
        """
        self._check_map(x)
        x = floating(x)

        def split_channels(y, number):
            return y.reshape(*x.shape[:-1], number, -1)

        mode = dict(use_running_average=use_running_average)
        queries = split_channels(self.norm_q(self.to_q(x), **mode), self.heads)
        values = split_channels(self.norm_v(self.to_v(x), **mode), self.depth)
        keys = split_channels(self.to_k(x), self.depth)
        bias = None if self.bias is None else self.bias[...]
        y = apply_lambdas(queries, keys, values, self.table[...], bias, method=self.method)
        return y.reshape(*x.shape[:-1], -1)

    def _check_map(self, x: jax.Array) -> None:
        axes = self.table.ndim - 2
        if (
            x.ndim != axes + 2
            or x.shape[-1] != self.inputs
            or self.size not in (None, x.shape[1:-1])
        ):
            spatial = f"{axes} spatial axes" if self.size is None else f"*{self.size}"
            raise ValueError(f"expected (batch, {spatial}, {self.inputs}), got {x.shape}")


def _check(outputs, size, window, heads, method) -> None:
    if (size is None) == (window is None):
        raise ValueError(f"expected either size or window, got {size} and {window}")
    if len(size or window) not in (1, 2):
        raise ValueError(f"expected 1 or 2 axes, got {size or window}")
    if window and any(n % 2 == 0 for n in window):
        raise ValueError(f"the window must be odd on every axis, got {tuple(window)}")
    if outputs % heads:
        raise ValueError(f"{outputs} channels do not divide into {heads} heads")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
