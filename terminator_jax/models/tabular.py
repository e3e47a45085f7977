"""The Terminator for tables: slow-fast blocks of feature vectors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.dropout import ChannelDropout
from terminator_jax.layers.hyperzzw_gate import HyperZZWGate
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.models.fields import (
    ALL_POSITIVE,
    DROPOUT,
    NOT_NEGATIVE,
    POSITIVE,
    check_fields,
)
from terminator_jax.ops import hyperzzw
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.dtypes import at_least_float32, promote_to_float32
from terminator_jax.ops.standardize import AxisName, standardize

# What the bottleneck of a block reads, in the order of the block for maps.
PARTS = ("o", "f", "o_u", "s", "o_h", "i")


@dataclasses.dataclass(frozen=True)
class TabularConfig:
    """Everything that shapes a `TabularTerminator`; the defaults suit some hundred rows.

    Attributes:
      features: columns of the table, less what is to be predicted.
      num_classes: number of logits; None for regression.
      targets: numbers to predict for each row, in regression.
      widths: features of each block's output.
      slow_hidden: width of the slow networks; None for kernels that are parameters.
      slow_layers: hidden layers of the slow networks.
      dropout: probability of dropping a feature of a block's output.
    """

    features: int
    num_classes: int | None = None
    targets: int = 1
    widths: tuple[int, ...] = (32, 32)
    slow_hidden: int | None = 16
    slow_layers: int = 1
    dropout: float = 0.1

    def __post_init__(self):
        check_fields(self, RULES)

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for each row."""
        return self.targets if self.num_classes is None else self.num_classes


RULES = {
    **dict.fromkeys(("features", "num_classes", "targets", "slow_hidden"), POSITIVE),
    "widths": ALL_POSITIVE,
    "slow_layers": NOT_NEGATIVE,
    "dropout": DROPOUT,
}


class TabularTerminator(nnx.Module):
    """Classifies rows, or predicts real numbers of them.

    Every feature is multiplied with every other in the first block already, as it is; no residuals.

    Example:
      >>> config = TabularConfig(features=13, num_classes=3)
      >>> model = TabularTerminator(config, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((4, 13))).shape
      (4, 3)
      >>> TabularTerminator(TabularConfig(features=10), rngs=nnx.Rngs(0))(jnp.ones((4, 10))).shape
      (4, 1)

    Columns should have about zero mean and unit variance, and so should the targets of a
    regression: standardize them with the statistics of the rows that train.

    Features are standardized within each row, not over the batch: what is predicted for a row
    depends on nothing else, so that one row alone, or the last few of a table, can be asked for,
    and small batches train as large ones do.

    Args:
      config: the shape of the network.
      dtype: dtype of the computation, e.g. `jnp.bfloat16`; statistics, kernels and outputs stay in
        float32 or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any: dropout alone asks for it.
      rngs: the source of the initial values.

    Source: the block of Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024, for vectors: without space there are no local branches, and a mean over
    space is the vector itself.
    """

    def __init__(
        self,
        config: TabularConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self.blocks = nnx.List(
            TabularBlock(
                inputs, outputs, slow_hidden=config.slow_hidden, slow_layers=config.slow_layers,
                dropout=config.dropout, dtype=dtype, param_dtype=param_dtype,
                axis_name=axis_name, rngs=rngs,
            )
            for inputs, outputs in itertools.pairwise((config.features, *config.widths))
        )  # fmt: skip
        self.head = pointwise(
            config.widths[-1], config.outputs, param_dtype=param_dtype,
            promote_dtype=promote_to_float32, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `(batch, num_classes)` or predictions `(batch, targets)`.

        Args:
          x: rows, `(batch, features)`.
          rngs: with a `dropout` stream; without it, or after `eval()`, nothing is dropped.

        Raises:
          ValueError: if `x` does not fit the configuration.
          TypeError: if `x` is not of a floating-point type.
        """
        if x.ndim != 2 or x.shape[1] != self.config.features:
            raise ValueError(f"expected rows (batch, {self.config.features}), got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected floating-point rows, got {x.dtype}: standardize them first")
        x = x if self.dtype is None else x.astype(self.dtype)
        for block in self.blocks:
            x = block(x, rngs=rngs)
        return self.head(x.astype(at_least_float32(x.dtype)))


class TabularBlock(nnx.Module):
    """Mixes the features of vectors x by one hyper-kernel K, with IS within each row.

    With `x ∘ c = x ⊙ (c @ K)`, `f = IS(RGU₂(x ∘ x) + RGU₁(x))`, `u = IS(mixer x)` and
    `h = IS(x ⊙ sigmoid(x ⊙ k_h ⊙ x))`: `o = x ∘ f`, `o_u = x ∘ u`, `o_h = x ∘ h`,
    `s = sigmoid(o) ⊙ o`, `i = x ⊙ sigmoid(o ⊙ k_i ⊙ o)`. Concatenated, in the order of `PARTS`,
    then bottleneck → IS → GELU → + one scalar → dropout.

    Example:
      >>> block = TabularBlock(13, 32, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((4, 13))).shape
      (4, 32)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        slow_hidden: int | None = 16,
        slow_layers: int = 1,
        dropout: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        fast = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = HyperZZWGate(inputs, inputs, hidden=slow_hidden, layers=slow_layers, **fast)
        self.rgu1, self.rgu2 = VectorRGU(inputs, **fast), VectorRGU(inputs, **fast)
        self.mixer = pointwise(inputs, inputs, **fast)
        self.channel_kernel = nnx.Param(jnp.zeros(inputs, param_dtype))
        self.interaction_kernel = nnx.Param(jnp.zeros(inputs, param_dtype))
        self.bottleneck = pointwise(len(PARTS) * inputs, outputs, **fast)
        self.scalar = nnx.Param(jnp.zeros((), param_dtype))
        self.dropout = ChannelDropout(dropout, axis_name=axis_name)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Applies the block: `(batch, inputs)` to `(batch, outputs)`; drops only with `rngs`."""
        parts = self.parts(x)
        y = self.bottleneck(jnp.concatenate([parts[name] for name in PARTS], axis=1))
        y = gelu(standardize(y, (1,))) + self.scalar[...].astype(y.dtype)
        return self.dropout(y, rngs=rngs)

    def parts(self, x: jax.Array) -> dict[str, jax.Array]:
        """Computes what the bottleneck reads, each `(batch, inputs)`."""
        f = standardize(self.rgu2(self.gate(x, x)) + self.rgu1(x), (1,))
        u = standardize(self.mixer(x), (1,))
        h = standardize(_interact(x, x, self.channel_kernel), (1,))
        o, o_u, o_h = (self.gate(x, context) for context in (f, u, h))
        i = _interact(x, o, self.interaction_kernel)
        return dict(o=o, f=f, o_u=o_u, s=jax.nn.silu(o), o_h=o_h, i=i)


class VectorRGU(nnx.Module):
    """Gates vectors by projections of themselves: `out = W_y GELU(IS(W_k x ⊙ W_q x))`.

    Of the unit for maps `W_q W_v` is one product, and p would be one value for all.

    Example:
      >>> VectorRGU(12, rngs=nnx.Rngs(0))(jnp.ones((2, 12))).shape
      (2, 12)
    """

    def __init__(self, features: int, **options):
        self.k, self.q, self.y = (pointwise(features, features, **options) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the unit to `(batch, features)`."""
        return self.y(gelu(standardize(self.k(x) * self.q(x), (1,))))


def _interact(x: jax.Array, y: jax.Array, kernel: nnx.Param) -> jax.Array:
    """Computes `x ⊙ sigmoid(y ⊙ k ⊙ y)`."""
    return x * jax.nn.sigmoid(hyperzzw.quadratic_form(y, kernel[...].astype(y.dtype)[None]))
