"""The four slow networks, which generate the kernels of the fast network.

| | axes | size | channels | depends on the input |
|---|---|---|---|---|
| `GlobalSlowNet` | those of the data | the map's | C | no |
| `ChannelSlowNet` | 1 | C | 1 | no |
| `SpatialSlowNet` | those of the data | the map's | 1 | no |
| `LocalSlowNets` | those of the data | small | C | yes |
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.layers.initializers import gabor_init, ones, uniform, zeros
from terminator_jax.layers.magnet import OMEGA0, MAGNet
from terminator_jax.ops import magnet, pooling
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.standardize import AxisName, across


class GlobalSlowNet(MAGNet):
    """Generates a hyper-kernel as large as the map: `(*size, channels)`.

    Example:
      >>> GlobalSlowNet((8, 8), 12, rngs=nnx.Rngs(0))().shape
      (8, 8, 12)
    """


class ChannelSlowNet(MAGNet):
    """Generates a kernel over the channels: `(channels,)`.

    Example:
      >>> ChannelSlowNet(12, rngs=nnx.Rngs(0))().shape
      (12,)
    """

    def __init__(self, channels: int, *, hidden: int = 32, layers: int = 2, **kwargs):
        super().__init__((channels,), 1, hidden=hidden, layers=layers, **kwargs)

    def kernel(self, values: jax.Array) -> jax.Array:
        return super().kernel(values)[..., 0]


class SpatialSlowNet(MAGNet):
    """Generates a kernel over the positions, shared by the channels: `(*size,)`.

    Example:
      >>> SpatialSlowNet((8, 8), rngs=nnx.Rngs(0))().shape
      (8, 8)
    """

    def __init__(self, size: tuple[int, ...], *, hidden: int = 64, layers: int = 2, **kwargs):
        super().__init__(size, 1, hidden=hidden, layers=layers, **kwargs)

    def kernel(self, values: jax.Array) -> jax.Array:
        return super().kernel(values)[..., 0]


class LocalSlowNets(nnx.Module):
    """Generates small kernels that depend on the batch, by several networks of one shape.

    The networks are evaluated together, by one `vmap`. So every kernel is padded with zeros to the
    size of the largest. A kernel depends on the maps only by their context: their mean over the
    batch, averaged to the size of the kernel. The networks keep no running averages; a layer that
    does averages the contexts and calls `kernels`.

    Example:
      >>> nets = LocalSlowNets((3, 9), 12, rngs=nnx.Rngs(0))
      >>> x, h = jnp.ones((2, 8, 8, 12)), jnp.zeros((2, 8, 8, 12))
      >>> nets((x, h)).shape
      (9, 9, 2, 12)

    Args:
      sizes: the odd size of each kernel, the same on every axis.
      channels: channels of the maps and of the kernels.
      ndim: spatial axes of the data.
      hidden: width of the networks.
      layers: L, the number of hidden layers.
      omega0: frequency scale of the sine filters.
      causal: for sequences: whether the kernels depend on the first position only, so that no
        result depends on a later position.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any: the kernels depend on the
        mean over the whole batch.
      rngs: the source of the initial values.

    Raises:
      ValueError: for even sizes; when called, for maps of other shapes.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024; the normalization's constants are those of its public release.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        channels: int,
        *,
        ndim: int = 2,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = OMEGA0,
        causal: bool = False,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        if not sizes or any(k < 1 or k % 2 == 0 for k in sizes):
            raise ValueError(f"sizes of local kernels must be odd, got {tuple(sizes)}")
        self.sizes, self.channels, self.ndim = tuple(sizes), channels, ndim
        self.causal, self.axis_name = causal, axis_name
        n = len(self.sizes)

        def param(init, *shape):
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        def gabor(key, shape, dtype):
            init = gabor_init(omega0)
            return jnp.stack([init(k, shape[1:], dtype) for k in jax.random.split(key, n)])

        def out(key, shape, dtype):
            scale = [math.sqrt(3 / hidden / k**ndim) for k in self.sizes]
            return uniform(1.0)(key, shape, dtype) * np.asarray(scale, dtype)[:, None, None]

        square = uniform(math.sqrt(3 / hidden))
        self.gabor_weight = param(gabor, n, layers + 1, ndim, hidden)
        self.gabor_bias = param(zeros, n, layers + 1, hidden)
        self.weight = param(square, n, layers, hidden, hidden)
        self.bias = param(ones, n, layers, hidden)
        # One value per position, one kernel after the other.
        self.position = param(zeros, sum(k**ndim for k in self.sizes))
        self.out_weight = param(out, n, hidden, channels)
        self.out_bias = param(zeros, n, channels)
        self.reduce_weight = param(uniform(channels**-0.5), n, channels, hidden)
        self.reduce_bias = param(uniform(channels**-0.5), n, hidden)
        self.mix_weight = param(uniform(hidden**-0.5), n, hidden, hidden)
        self.mix_bias = param(uniform(hidden**-0.5), n, hidden)
        self.context_weight = param(square, n, layers, hidden, hidden)
        self.context_bias = param(ones, n, layers, hidden)

    @property
    def context_shape(self) -> tuple[int, int, int]:
        """The shape of the contexts, `(number, positions, channels)`."""
        return len(self.sizes), max(self.sizes) ** self.ndim, self.channels

    @property
    def context_dtype(self) -> jnp.dtype:
        """The dtype of the contexts and of the kernels, float32 or wider."""
        return at_least_float32(self.weight.dtype)

    def __call__(self, sources: Sequence[jax.Array]) -> jax.Array:
        """Returns kernels `(K, …, K, number, channels)`, where K is the largest size.

        Args:
          sources: one map `(batch, *spatial, channels)` for each kernel.
        """
        return self.kernels(across(self.contexts(sources), self.axis_name))

    def contexts(self, sources: Sequence[jax.Array]) -> jax.Array:
        """Computes the contexts of maps, `(number, positions, channels)`, of this device's batch.

        Args:
          sources: one map `(batch, *spatial, channels)` for each kernel.
        """
        self._check(sources)
        return self.pool([jnp.mean(x, axis=0) for x in floating(list(sources))])

    def pool(self, means: Sequence[jax.Array]) -> jax.Array:
        """Computes the contexts from the maps' means over the batch, `(*spatial, channels)`."""
        if self.causal:
            means = [mean[:1] for mean in means]
        maps = jnp.stack([mean.astype(self.context_dtype) for mean in means])
        return pooling.adaptive_average_each(maps, self.sizes).reshape(self.context_shape)

    def kernels(self, contexts: jax.Array) -> jax.Array:
        """Returns the kernels for contexts, `(K, …, K, number, channels)`."""
        contexts = floating(contexts)
        grids, inside, index = _padded_grids(self.sizes, self.ndim)
        net = magnet.MAGNetParams(
            self.gabor_weight[...], self.gabor_bias[...], self.weight[...], self.bias[...],
            jnp.zeros(inside.size, self.position.dtype).at[index].set(self.position[...])
            .reshape(inside.shape),
            self.out_weight[...], self.out_bias[...],
        )  # fmt: skip
        mix = magnet.Context(
            self.reduce_weight[...], self.reduce_bias[...], self.mix_weight[...],
            self.mix_bias[...], self.context_weight[...], self.context_bias[...],
        )  # fmt: skip
        kernels = jax.vmap(magnet.context_magnet)(
            net, mix, jnp.asarray(grids, contexts.dtype), contexts,
            jnp.asarray(inside, contexts.dtype),
        )  # fmt: skip
        size = (max(self.sizes),) * self.ndim
        return jnp.moveaxis(kernels, 0, 1).reshape(*size, len(self.sizes), self.channels)

    def crop(self, kernels: jax.Array, n: int) -> jax.Array:
        """Crops the n-th kernel to its own size, `(size, …, size, channels)`."""
        margin = (max(self.sizes) - self.sizes[n]) // 2
        own = slice(margin, margin + self.sizes[n])
        return kernels[(own,) * self.ndim][..., n, :]

    def _check(self, sources: Sequence[jax.Array]) -> None:
        if len(sources) != len(self.sizes):
            raise ValueError(f"{len(self.sizes)} kernels need as many maps, got {len(sources)}")
        for x in sources:
            if x.ndim != self.ndim + 2 or x.shape[-1] != self.channels:
                raise ValueError(
                    f"expected (batch, {self.ndim} spatial axes, {self.channels}), got {x.shape}"
                )
        if len({x.shape[1:] for x in sources}) > 1:
            raise ValueError(f"maps must be of one size, got {[x.shape for x in sources]}")


class LocalSlowNet(LocalSlowNets):
    """Generates one small kernel that depends on the batch: `(size, …, size, channels)`.

    Example:
      >>> net = LocalSlowNet(5, 12, rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 8, 8, 12))).shape
      (5, 5, 12)
    """

    def __init__(self, size: int, channels: int, **kwargs):
        super().__init__((size,), channels, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the kernel for a map `(batch, *spatial, channels)`."""
        return super().__call__((x,))

    def kernels(self, contexts: jax.Array) -> jax.Array:
        """Returns the kernel for a context `(1, positions, channels)`."""
        return super().kernels(contexts)[..., 0, :]


def _padded_grids(sizes: Sequence[int], ndim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads the grid of every kernel to the size of the largest.

    Returns:
      The coordinates `(number, positions, ndim)`, -1 to 1 across each kernel. A mask `(number,
      positions)`, 1 for the positions of the kernel itself. The flat indices of the ones.
    """
    largest = max(sizes)
    offset = np.arange(largest) - largest // 2
    axes = np.stack(np.meshgrid(*[offset] * ndim, indexing="ij"), -1).reshape(-1, ndim)
    half = np.array(sizes)[:, None] // 2
    inside = (abs(axes).max(-1)[None] <= half).astype(np.float64)
    # A kernel of one position sits at -1, as linspace(-1, 1, 1) has it.
    grids = np.where(half[..., None] == 0, -1.0, axes[None] / np.maximum(half, 1)[..., None])
    return grids, inside, np.flatnonzero(inside)
