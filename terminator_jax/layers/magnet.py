"""MAGNet, the coordinate network that generates kernels."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.ops import coordinates, magnet

OMEGA0 = 2000.0


def uniform(bound: float):
    """Initializer: uniform in `±bound`."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def gabor_init(omega0: float):
    """Initializer of the Gabor weights, `(layers, d, hidden)`.

    `U(±1/√d) · 2π ω0 γ`, with `γ ~ Gamma(6/(l+1), rate 1)` drawn per entry of layer l.
    """

    def init(key, shape, dtype=jnp.float32):
        wave_key, scale_key = jax.random.split(key)
        wave = uniform(1 / math.sqrt(shape[-2]))(wave_key, shape, dtype)
        layers = jnp.arange(1, shape[-3] + 1, dtype=dtype)[:, None, None]
        scale = jax.random.gamma(scale_key, jnp.broadcast_to(6 / layers, shape), dtype=dtype)
        return wave * (2 * math.pi * omega0) * scale

    return init


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
      param_dtype: dtype of the parameters; phases are computed in it or in float32, if wider.
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

        square, zeros = uniform(math.sqrt(3 / hidden)), nnx.initializers.zeros
        self.gabor_weight = param(gabor_init(omega0), layers + 1, len(size), hidden)
        self.gabor_bias = param(zeros, layers + 1, hidden)
        self.weight = param(square, layers, hidden, hidden)
        self.bias = param(nnx.initializers.ones, layers, hidden)
        self.position = param(zeros, positions)
        self.out_weight = param(uniform(math.sqrt(3 / hidden / positions)), hidden, features)
        self.out_bias = param(zeros, features)

    def __call__(self) -> jax.Array:
        """The kernel, `(*size, features)`."""
        net = magnet.Magnet(*(getattr(self, name)[...] for name in magnet.Magnet._fields))
        dtype = jnp.promote_types(jnp.float32, self.gabor_weight.dtype)
        kernel = magnet.magnet(net, coordinates.grid(self.size, dtype))
        return kernel.reshape(*self.size, self.features)
