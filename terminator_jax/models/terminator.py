"""The Terminator: slow-fast blocks without residuals, attention or downsampling."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.local import LocalBranch
from terminator_jax.layers.magnet import OMEGA0, generate_kernels
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.layers.sfne import BRANCHES, SFNEBlock, SlowKernels, SlowWidths
from terminator_jax.models.fields import ALL_POSITIVE, DROPOUTS, POSITIVE, Rule, check_fields
from terminator_jax.ops import coordinates
from terminator_jax.ops.dtypes import at_least_float32, promote_to_float32
from terminator_jax.ops.hyperzzw import check_operator
from terminator_jax.ops.standardize import AxisName


@dataclasses.dataclass(frozen=True)
class TerminatorConfig:
    """Configures a Terminator.

    Variants for pictures are `cifar()`, `mnist()` and `digits()`, those for the same pictures as
    sequences of pixels `scifar()`, `smnist()` and `sdigits()`.

    Attributes:
      size: positions of the input per axis, e.g. `(rows, columns)`.
      channels: channels of the input.
      num_classes: number of logits.
      factors: λ of each block: it has λ times the channels of its input.
      skips: for each block, the earlier blocks whose output it also reads.
      dropout: channel dropout of each block.
      branches: the local branches of every block.
      operator: the operation of the hyper-kernel with a map: `dot`, `product` or `convolution`.
      operator_scale: a factor on the operator's results; `resized` sets it.
      causal: for sequences: no feature depends on a later position. The logits depend on all.
      groups: groups of the standardization after each bottleneck; they divide each block's output.
      global_layers: depth of each block's global slow network. The other fields size the slow
        networks alike in all blocks, see `SlowWidths`.
      omega0: frequency scale of the slow networks.
    """

    size: tuple[int, ...] = (32, 32)
    channels: int = 3
    num_classes: int = 10
    factors: tuple[int, ...] = (4, 3, 2, 2, 2)
    skips: tuple[tuple[int, ...], ...] = ((), (), (0,), (1,), (2, 1))
    dropout: tuple[float, ...] = (0.0, 0.05, 0.05, 0.05, 0.05)
    branches: tuple[LocalBranch, ...] = BRANCHES
    operator: str = "dot"
    operator_scale: float = 1.0
    causal: bool = False
    groups: int = 12
    global_hidden: int = 64
    global_layers: tuple[int, ...] = (3, 2, 2, 2, 2)
    local_hidden: int = 32
    local_layers: int = 2
    channel_hidden: int = 32
    channel_layers: int = 2
    interaction_channel_hidden: int = 16
    interaction_spatial_hidden: int = 64
    interaction_layers: int = 2
    omega0: float = OMEGA0

    def __post_init__(self):
        check_fields(self, RULES)
        check_operator(self.operator, self.size, self.causal)
        for name in ("skips", "dropout", "global_layers"):
            if len(getattr(self, name)) != len(self.factors):
                raise ValueError(
                    f"{name} must have one entry per block: {len(self.factors)} factors,"
                    f" {name} = {getattr(self, name)}"
                )
        for block, earlier in enumerate(self.skips):
            if any(not 0 <= e < block for e in earlier):
                raise ValueError(f"block {block} can only skip from blocks before it: {earlier}")
        for channels, factor in zip(self.block_channels, self.factors, strict=False):
            if channels * factor % self.groups:
                raise ValueError(
                    f"{channels} x {factor} channels do not divide into {self.groups} groups"
                )

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels at the input of each block and at the output of the last."""
        products = [math.prod(self.factors[:i]) for i in range(len(self.factors) + 1)]
        return tuple(self.channels * p for p in products)

    @classmethod
    def cifar(cls, **overrides) -> "TerminatorConfig":
        """32×32×3, 1,336,855 parameters for 10 classes: the published network."""
        return cls(**overrides)

    @classmethod
    def mnist(cls, **overrides) -> "TerminatorConfig":
        """28×28×1, 114,879 parameters."""
        return cls(**{**FOUR_BLOCKS, **NARROW, "size": (28, 28), **overrides})

    @classmethod
    def digits(cls, **overrides) -> "TerminatorConfig":
        """8×8×1, 240,415 parameters."""
        return cls(**{**FOUR_BLOCKS, "size": (8, 8), **overrides})

    @classmethod
    def scifar(cls, **overrides) -> "TerminatorConfig":
        """Sequences of 1,024 pixels of 3 colours."""
        return cls(**{"size": (1024,), "operator": "convolution", **overrides})

    @classmethod
    def smnist(cls, **overrides) -> "TerminatorConfig":
        """Sequences of 784 grey pixels."""
        return cls(**{**THREE_BLOCKS, **NARROW, "size": (784,), **overrides})

    @classmethod
    def sdigits(cls, **overrides) -> "TerminatorConfig":
        """Sequences of 64 grey pixels."""
        return cls.digits(**{"size": (64,), "operator": "convolution", **overrides})


def _is_branch(branch: LocalBranch) -> bool:
    odd = isinstance(branch.size, int) and branch.size > 0 and branch.size % 2 == 1
    return odd and {branch.kernel_from, branch.applied_to} <= {"x", "h", "u"}


RULES = {
    "size": Rule(lambda size: 1 <= len(size) <= 3 and min(size) > 0, "1 to 3 positive numbers"),
    "factors": ALL_POSITIVE,
    "dropout": DROPOUTS,
    "branches": Rule(
        lambda branches: branches and all(map(_is_branch, branches)),
        "one or more local branches with an odd size and the maps x, h or u",
    ),
    "operator_scale": POSITIVE,
    "global_layers": ALL_POSITIVE,
    "omega0": POSITIVE,
    **dict.fromkeys(
        (
            *("channels", "num_classes", "groups", "global_hidden", "local_hidden"),
            *("local_layers", "channel_hidden", "channel_layers", "interaction_channel_hidden"),
            *("interaction_spatial_hidden", "interaction_layers"),
        ),
        POSITIVE,
    ),
}
# Fields of the variants for small grey pictures, and for sequences of their pixels.
NARROW = dict(global_hidden=32, local_hidden=16, channel_hidden=16, interaction_spatial_hidden=32)
THREE_BLOCKS = dict(
    channels=1,
    factors=(12, 1, 1),
    skips=((), (), (0,)),
    dropout=(0.0, 0.05, 0.05),
    operator="convolution",
    global_layers=(2, 2, 2),
)
FOUR_BLOCKS = dict(
    channels=1,
    factors=(12, 2, 1, 2),
    skips=((), (), (0,), (1, 0)),
    dropout=(0.0, 0.05, 0.05, 0.05),
    global_layers=(3, 2, 2, 2),
)


class Intermediates(NamedTuple):
    """Holds `hyper_kernels`, `(*size, C)` a block, and `features`, `(batch, *size, λC)` a block."""

    hyper_kernels: list[jax.Array]
    features: list[jax.Array]


class Resized(NamedTuple):
    """Holds the `model` at its new size, and `changes`: one line for each thing that changed."""

    model: "Terminator"
    changes: tuple[str, ...]


class Terminator(nnx.Module):
    """Classifies pictures or sequences with slow-fast blocks.

    Example:
      >>> def logits(x):
      ...     model = Terminator(TerminatorConfig.digits(), rngs=nnx.Rngs(0))
      ...     return model(x)
      >>> jax.eval_shape(logits, jnp.ones((4, 8, 8, 1))).shape
      (4, 10)

    In training mode, the initial one, standardizations and local kernels use the batch, as in the
    release, and update their running averages. After `eval()` they use the averages. Then a
    sample's logits do not depend on the rest of its batch. A model without averages, such as a new
    one or one from the release, needs `terminator_jax.calibrate(model, batches)` first, or
    `terminator_jax.use_batch_statistics(model)` after `eval()`.

    Args:
      config: the configuration of the network.
      dtype: dtype of the computation, e.g. `jnp.bfloat16`; statistics, kernels and logits stay in
        float32 or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split.
      remat: whether gradients recompute the inside of a block instead of keeping it in memory,
        which takes less memory and more time.
      implementation: the implementation of the blocks, see `SFNEBlock`.
      rngs: the source of the initial values.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        config: TerminatorConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        remat: bool = False,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.axis_name = config, dtype, axis_name
        self.remat, self.implementation = remat, implementation
        widths = {f.name for f in dataclasses.fields(SlowWidths)} - {"global_layers"}
        channels = config.block_channels
        self.blocks = nnx.List(
            SFNEBlock(
                config.size, channels[i], factor,
                skips=[channels[j + 1] for j in config.skips[i]],
                branches=config.branches, operator=config.operator,
                operator_scale=config.operator_scale, causal=config.causal,
                widths=SlowWidths(
                    global_layers=config.global_layers[i],
                    **{name: getattr(config, name) for name in widths},
                ),
                groups=config.groups, dropout=config.dropout[i], omega0=config.omega0,
                dtype=dtype, param_dtype=param_dtype, axis_name=axis_name,
                implementation=implementation, rngs=rngs,
            )
            for i, factor in enumerate(config.factors)
        )  # fmt: skip
        self.head = pointwise(
            channels[-1],
            config.num_classes,
            param_dtype=param_dtype,
            promote_dtype=promote_to_float32,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, *, rngs: nnx.Rngs | None = None, intermediates: bool = False
    ) -> jax.Array | tuple[jax.Array, Intermediates]:
        """Returns the logits `(batch, num_classes)` of `x (batch, *size, channels)`.

        Args:
          x: floating-point pictures or sequences.
          rngs: random keys with a `dropout` stream; without them, or after `eval()`, nothing is
            dropped.
          intermediates: whether to return `(logits, Intermediates)`.

        Raises:
          ValueError: if `x` does not fit the configuration, or in evaluation before any batch was
            averaged.
          TypeError: if `x` is of integers, which here are pictures that were not normalized.
        """
        self._check(x)
        kernels = self._slow_kernels()
        features: list[jax.Array] = []
        apply = nnx.remat(_apply_block) if self.remat else _apply_block
        for block, generated, earlier in zip(self.blocks, kernels, self.config.skips, strict=True):
            x = apply(block, x, [features[j] for j in earlier], generated, rngs)
            features.append(x)
        space = tuple(range(1, x.ndim - 1))
        logits = self.head(jnp.mean(x, space, dtype=at_least_float32(x.dtype)))
        if not intermediates:
            return logits
        return logits, Intermediates([k.hyper_kernel for k in kernels], features)

    def resized(self, size: tuple[int, ...]) -> "Resized":
        """Returns the same network on a finer or coarser grid, with a list of changes.

        A hyper-kernel is a function of coordinates, so it is evaluated on the new grid. Tables with
        one value per position are interpolated. The operator's results are scaled, because they sum
        over more or fewer positions. The accuracy that remains depends on `omega0`. At 2000, the
        published value, a kernel varies faster than the grid resolves, and a new grid gives
        different kernels.

        Args:
          size: positions per axis.

        Raises:
          ValueError: for another number of axes, or sides that differ with the operator `dot`.

        Example:
          >>> def larger():
          ...     return Terminator(TerminatorConfig.digits(), rngs=nnx.Rngs(0)).resized((16, 16))
          >>> nnx.eval_shape(lambda: larger().model).config.size
          (16, 16)
        """
        old, size = self.config, tuple(size)
        if len(size) != len(old.size):
            raise ValueError(f"size must have {len(old.size)} axes like {old.size}, got {size}")
        check_operator(old.operator, size, old.causal)
        # The number of positions that the operator sums over.
        terms_per_output = {
            "dot": lambda s: s[-1],
            "convolution": math.prod,
            "product": lambda s: 1,
        }
        terms = terms_per_output[old.operator]
        scale = old.operator_scale * terms(old.size) / terms(size)
        config = dataclasses.replace(old, size=size, operator_scale=scale)
        model = nnx.eval_shape(
            lambda: Terminator(
                config, dtype=self.dtype, param_dtype=self.head.kernel.dtype,
                axis_name=self.axis_name, remat=self.remat, implementation=self.implementation,
                rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
        changes = [f"operator_scale: {old.operator_scale:.4g} to {scale:.4g}"] * (scale != 1)
        tables = _tables(self, old.size) & _tables(model, size) if old.size != size else set()
        mine, new = (nnx.to_flat_state(nnx.state(m)) for m in (self, model))
        for (path, variable), (_, target) in zip(mine, new, strict=True):
            value = variable[...]
            if path in tables or value.shape != target.shape:
                changes.append(f"{'.'.join(map(str, path))}: {old.size} interpolated to {size}")
                columns = value.reshape(*old.size, -1)
                columns = jax.vmap(coordinates.interpolate, (-1, None), -1)(columns, size)
                value = columns.reshape(target.shape)
            target.set_value(value)
        both = zip(nnx.iter_modules(model), nnx.iter_modules(self), strict=True)
        for (_, there), (_, here) in both:
            for mode in {"use_running_average", "deterministic"} & vars(here).keys():
                setattr(there, mode, getattr(here, mode))
        return Resized(model, tuple(changes))

    def _slow_kernels(self) -> list[SlowKernels]:
        """Evaluates the slow networks of all blocks together."""
        nets = [block.slow_nets() for block in self.blocks]
        kernels = iter(generate_kernels([net for named in nets for net in named.values()]))
        return [SlowKernels(**{name: next(kernels) for name in named}) for named in nets]

    def bake(self) -> "Terminator":
        """Makes a model for inference, with constants in the place of its slow networks.

        The local kernels become constant too, made from the average contexts of training. The
        running averages of the standardizations are multiplied into the weights before them.

        Returns:
          A `BakedTerminator`. It is called like this model, and gives the same logits as this one
          after `eval()`.

        Raises:
          ValueError: for a causal model, or one without running averages.

        Example:
          >>> from terminator_jax import calibrate
          >>> options = dict(factors=(12,), skips=((),), dropout=(0.0,), global_layers=(2,))
          >>> config = dataclasses.replace(TerminatorConfig.digits(), **options)
          >>> model = Terminator(config, rngs=nnx.Rngs(0))
          >>> pictures = jnp.ones((4, 8, 8, 1))
          >>> _ = calibrate(model, [pictures])
          >>> model.bake()(pictures).shape
          (4, 10)
        """
        from terminator_jax.models.baked import bake

        return bake(self)

    def _check(self, x: jax.Array) -> None:
        expected = (*self.config.size, self.config.channels)
        if x.shape[1:] != expected:
            raise ValueError(f"expected pictures (batch, *{expected}), got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected floating-point pictures, got {x.dtype}: scale them first")


def _tables(model: nnx.Module, size: tuple[int, ...]) -> set[tuple]:
    """Returns the paths of the tables with one value per position of a grid."""
    layers = nnx.iter_modules(model)
    return {(*path, "position") for path, layer in layers if getattr(layer, "size", None) == size}


def _apply_block(
    block: SFNEBlock,
    x: jax.Array,
    skips: list[jax.Array],
    kernels: SlowKernels,
    rngs: nnx.Rngs | None,
) -> jax.Array:
    return block(x, skips, kernels=kernels, rngs=rngs)
