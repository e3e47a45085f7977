"""HyperZ·Z·W for vectors, such as the rows of a table."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import kaiming_normal, uniform, zeros
from terminator_jax.ops import hyperzzw
from terminator_jax.ops.dtypes import at_least_float32, floating


class FeatureSlowNet(nnx.Module):
    """Generates a kernel between the features of two vectors: an MLP from a code to each row.

    Features have no order, and so no coordinates: the code of each of the context's features is
    learned. With `h_0` the codes, `h_i = relu(h_{i-1} W_i + b_i)`, `K = h_L W_o + b_o`.

    The first kernel has the variance of a Glorot-uniform one.

    Example:
      >>> FeatureSlowNet(5, 3, rngs=nnx.Rngs(0))().shape
      (5, 3)

    Args:
      context_dim: rows of the kernel, features of the context.
      input_dim: columns of the kernel, features of what the context gates.
      hidden: width of the network and of the codes.
      layers: L, the number of hidden layers.
      param_dtype: dtype of the parameters; the kernel is computed in it or in float32, if wider.
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes below 1.
    """

    def __init__(
        self,
        context_dim: int,
        input_dim: int,
        *,
        hidden: int = 32,
        layers: int = 1,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(context_dim, input_dim, hidden, layers) < 1:
            raise ValueError(
                "context_dim, input_dim, hidden and layers must be positive, got"
                f" {context_dim}, {input_dim}, {hidden}, {layers}"
            )

        def param(init, *shape):
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        # Codes of variance 1 keep a mean square of 1 through the layers that follow.
        self.code = param(uniform(math.sqrt(3)), context_dim, hidden)
        self.weight = param(_kaiming_stack, layers, hidden, hidden)
        self.bias = param(zeros, layers, hidden)
        bound = glorot_bound(context_dim, input_dim) / math.sqrt(hidden)
        self.out_weight = param(uniform(bound), hidden, input_dim)
        self.out_bias = param(zeros, input_dim)

    def __call__(self) -> jax.Array:
        """Generates the kernel, `(context_dim, input_dim)`."""
        wide = at_least_float32(self.code.dtype)
        code, weight, bias, out_weight, out_bias = (
            p[...].astype(wide)
            for p in (self.code, self.weight, self.bias, self.out_weight, self.out_bias)
        )
        h = code
        for w, b in zip(weight, bias, strict=True):
            h = jax.nn.relu(_affine(h, w, b))
        return _affine(h, out_weight, out_bias)


class HyperZZWGate(nnx.Module):
    """Gates every feature of x by all features of a context: `y = x ⊙ (context @ K)`.

    K is a parameter, Glorot-uniform at first, or what a `FeatureSlowNet` makes.

    Example:
      >>> layer = HyperZZWGate(3, 5, hidden=8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 3)), jnp.ones((2, 5))).shape
      (2, 3)
      >>> layer.kernel().shape
      (5, 3)

    Args:
      input_dim: features of x.
      context_dim: features of the context.
      hidden: width of the slow network that makes K; None for a K that is itself learned.
      layers: hidden layers of the slow network.
      dtype: dtype of the arguments, K's included, and of the result; that of x if None. Sums are
        float32 or wider.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes below 1, or when called with vectors of other sizes.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024, for vectors; Glorot and Bengio, "Understanding the difficulty of training
    deep feedforward neural networks", 2010, equation 16.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        *,
        hidden: int | None = None,
        layers: int = 1,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(input_dim, context_dim) < 1:
            raise ValueError(
                f"input_dim and context_dim must be positive, got {input_dim}, {context_dim}"
            )
        self.input_dim, self.context_dim = input_dim, context_dim
        self.hidden, self.dtype = hidden, dtype
        if hidden is None:
            init = uniform(glorot_bound(context_dim, input_dim))
            shape = (context_dim, input_dim)
            self.weight = nnx.Param(init(rngs.params(), shape, param_dtype))
        else:
            self.slow_net = FeatureSlowNet(
                context_dim, input_dim, hidden=hidden, layers=layers, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Gates x `(..., input_dim)` by a context `(..., context_dim)`; returns x's shape."""
        expected = (*x.shape[:-1], self.input_dim), (*x.shape[:-1], self.context_dim)
        if (x.shape, context.shape) != expected:
            raise ValueError(
                f"expected x (..., {self.input_dim}) and context (..., {self.context_dim}), got"
                f" {x.shape} and {context.shape}"
            )
        x, context = floating((x, context))
        dtype = x.dtype if self.dtype is None else self.dtype
        return hyperzzw.gate(*(a.astype(dtype) for a in (x, context, self.kernel())))

    def kernel(self) -> jax.Array:
        """Generates K, `(context_dim, input_dim)`."""
        return self.weight[...] if self.hidden is None else self.slow_net()


def glorot_bound(rows: int, columns: int) -> float:
    """Returns where Glorot's uniform distribution ends.

    Example:
      >>> glorot_bound(2, 4)
      1.0
    """
    return math.sqrt(6 / (rows + columns))


def _kaiming_stack(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.stack([kaiming_normal(k, shape[1:], dtype) for k in jax.random.split(key, shape[0])])


def _affine(h: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(h, weight, precision=jax.lax.Precision.HIGHEST) + bias[None]
