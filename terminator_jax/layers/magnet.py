"""MAGNet, the coordinate network that generates kernels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import gabor_init, ones, uniform, zeros
from terminator_jax.ops import coordinates, magnet
from terminator_jax.ops.dtypes import at_least_float32

OMEGA0 = 2000.0


class MAGNet(nnx.Module):
    """Generates a kernel of any size from the coordinates of its positions.

    Example:
      >>> net = MAGNet((8, 8), features=16, hidden=32, layers=2, rngs=nnx.Rngs(0))
      >>> net().shape
      (8, 8, 16)

    Args:
      size: positions of the kernel per axis.
      features: channels of the kernel.
      hidden: width of the network.
      layers: L, the number of hidden layers.
      omega0: frequency scale of the sine filters.
      param_dtype: dtype of the parameters; phases are computed in it, or in float32 if it is
        narrower.
      rngs: the source of the initial values.

    Source: Romero et al., "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel
    Sizes", 2021, section 3.1.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        features: int,
        *,
        hidden: int = 64,
        layers: int = 2,
        omega0: float = OMEGA0,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(*size, features, hidden, layers) < 1:
            raise ValueError(
                "size, features, hidden and layers must be positive, got"
                f" {size}, {features}, {hidden}, {layers}"
            )
        self.size, self.features = tuple(size), features
        positions = math.prod(size)

        def param(init, *shape):
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        square = uniform(math.sqrt(3 / hidden))
        self.gabor_weight = param(gabor_init(omega0), layers + 1, len(size), hidden)
        self.gabor_bias = param(zeros, layers + 1, hidden)
        self.weight = param(square, layers, hidden, hidden)
        self.bias = param(ones, layers, hidden)
        self.position = param(zeros, positions)
        self.out_weight = param(uniform(math.sqrt(3 / hidden / positions)), hidden, features)
        self.out_bias = param(zeros, features)

    def __call__(self) -> jax.Array:
        """Generates the kernel, `(*size, features)`."""
        return self.kernel(magnet.magnet(self.parameters(), self.coordinates()))

    def parameters(self) -> magnet.MAGNetParams:
        """Returns the parameters as `ops.magnet` takes them."""
        names = magnet.MAGNetParams._fields
        return magnet.MAGNetParams(*(getattr(self, name)[...] for name in names))

    def coordinates(self) -> jax.Array:
        """Returns the coordinates of the kernel's positions, `(positions, d)`."""
        dtype = at_least_float32(self.gabor_weight.dtype)
        return coordinates.grid(self.size, dtype)

    def kernel(self, values: jax.Array) -> jax.Array:
        """Reshapes values `(positions, features)` to the kernel."""
        return values.reshape(*self.size, self.features)


def generate_kernels(nets: Sequence[Callable[[], jax.Array]]) -> list[jax.Array]:
    """Computes `[net() for net in nets]`, with one `vmap` for all networks of a width and depth.

    One call for each network would take longer to compile. One that is no MAGNet is called.

    Example:
      >>> nets = [MAGNet((n, n), 3, hidden=8, rngs=nnx.Rngs(n)) for n in (4, 5)]
      >>> [kernel.shape for kernel in generate_kernels(nets)]
      [(4, 4, 3), (5, 5, 3)]
    """
    same_shape: dict[Any, list[int]] = {}
    kernels: list[Any] = [None] * len(nets)
    for n, net in enumerate(nets):
        if isinstance(net, MAGNet):
            same_shape.setdefault((net.gabor_weight.shape, net.gabor_weight.dtype), []).append(n)
        else:
            kernels[n] = net()
    for members in same_shape.values():
        for n, values in zip(members, _evaluate_stacked([nets[n] for n in members]), strict=True):
            kernels[n] = nets[n].kernel(values)
    return kernels


def _evaluate_stacked(nets: Sequence[MAGNet]) -> list[jax.Array]:
    """Evaluates networks of one width and depth together: a list of `(positions, features)`.

    Their numbers of positions may differ.
    """
    counts = [math.prod(net.size) for net in nets]

    def padded(x, count):
        return jnp.pad(x, [(0, max(counts) - count)] + [(0, 0)] * (x.ndim - 1))

    def stacked(name):
        values = [getattr(net, name)[...] for net in nets]
        if name == "position":
            values = [padded(x, count) for x, count in zip(values, counts, strict=True)]
        return jnp.stack(values)

    # If the numbers of features differ, the last layers are evaluated one by one.
    same_features = len({net.features for net in nets}) == 1
    names = [
        name for name in magnet.MAGNetParams._fields if same_features or not name.startswith("out")
    ]
    parameters = magnet.MAGNetParams(
        **dict.fromkeys(magnet.MAGNetParams._fields) | {n: stacked(n) for n in names}
    )
    grids = [padded(net.coordinates(), count) for net, count in zip(nets, counts, strict=True)]
    values = jax.vmap(magnet.magnet if same_features else magnet.hidden)(
        parameters, jnp.stack(grids)
    )
    own = [values[n, :count] for n, count in enumerate(counts)]
    if same_features:
        return own
    return [magnet.output(net.parameters(), h) for net, h in zip(nets, own, strict=True)]
