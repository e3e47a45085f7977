"""LambdaResNet: a residual network of bottlenecks with lambda layers in its later stages."""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.batch_norm import batch_norm
from terminator_jax.layers.initializers import kaiming_normal
from terminator_jax.layers.lambda_layer import LambdaLayer
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.models.fields import ALL_POSITIVE, POSITIVE, Rule, check_fields
from terminator_jax.ops.dtypes import at_least_float32, promote_to_float32
from terminator_jax.ops.standardize import AxisName


@dataclasses.dataclass(frozen=True)
class LambdaResNetConfig:
    """Configures a LambdaResNet.

    Variants for pictures of ImageNet's size are `lambda26()` and `lambda50()`, for smaller ones
    `cifar()`, `mnist()` and `digits()`. `plain_cifar()`, `plain_mnist()` and `plain_digits()` are
    residual networks of about as many parameters without lambda layers.

    Attributes:
      size: positions of the input, `(rows, columns)`.
      channels: channels of the input.
      num_classes: number of logits.
      blocks: bottlenecks of each stage.
      widths: channels inside the bottlenecks of each stage.
      strides: stride of each stage's first bottleneck.
      lambda_stages: the stages, from 0, whose bottlenecks have a lambda layer in place of the
        3×3 convolution.
      expansion: output channels of a bottleneck, as a multiple of its width.
      stem_width: channels of the convolution before the first stage, the stem.
      stem_kernel: kernel size of the stem.
      stem_stride: stride of the stem.
      stem_pool: whether a 3×3 max pooling with stride 2 follows the stem.
      window: positions per axis of a lambda layer's context; 0 for the whole map.
      heads: queries of each position, see `LambdaLayer`; they divide the widths.
      keys: channels of a key.
      depth: keys and values of each position.
    """

    size: tuple[int, ...] = (224, 224)
    channels: int = 3
    num_classes: int = 1000
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    lambda_stages: tuple[int, ...] = (2, 3)
    expansion: int = 4
    stem_width: int = 64
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    window: int = 0
    heads: int = 4
    keys: int = 16
    depth: int = 1

    def __post_init__(self):
        check_fields(self, RULES)
        for name in ("widths", "strides"):
            if len(getattr(self, name)) != len(self.blocks):
                raise ValueError(
                    f"{name} must have one entry per stage: blocks = {self.blocks}, {name} ="
                    f" {getattr(self, name)}"
                )
        if any(not 0 <= stage < len(self.blocks) for stage in self.lambda_stages):
            raise ValueError(
                f"lambda_stages must be from 0 to {len(self.blocks) - 1}, got {self.lambda_stages}"
            )
        for stage in self.lambda_stages:
            if self.widths[stage] % self.heads:
                raise ValueError(
                    f"heads is {self.heads}, and must divide the width of stage {stage},"
                    f" {self.widths[stage]}"
                )

    @property
    def stage_sizes(self) -> tuple[tuple[int, ...], ...]:
        """The `(rows, columns)` of each stage's output."""
        before = self.stem_stride * (2 if self.stem_pool else 1)
        strides = itertools.accumulate(self.strides, operator.mul, initial=before)
        return tuple(tuple(-(-n // s) for n in self.size) for s in list(strides)[1:])

    def scope(self, stage: int) -> dict[str, tuple[int, ...]]:
        """Returns the arguments of `LambdaLayer` for the context of a stage: `size` or `window`."""
        if self.window:
            return dict(window=(self.window, self.window))
        return dict(size=self.stage_sizes[stage])

    @classmethod
    def lambda50(cls, **overrides) -> "LambdaResNetConfig":
        """224×224×3, 50 layers, local contexts of 23×23, 15,559,880 parameters."""
        return cls(**{"window": 23, **overrides})

    @classmethod
    def lambda26(cls, **overrides) -> "LambdaResNetConfig":
        """224×224×3, 26 layers, local contexts of 23×23, 10,418,856 parameters."""
        return cls.lambda50(**{"blocks": (2, 2, 2, 2), **overrides})

    @classmethod
    def cifar(cls, **overrides) -> "LambdaResNetConfig":
        """32×32×3, 1,005,066 parameters, global contexts at 16×16 and 8×8."""
        return cls(**{**CIFAR, **overrides})

    @classmethod
    def mnist(cls, **overrides) -> "LambdaResNetConfig":
        """28×28×1, 55,114 parameters, global contexts at 7×7."""
        return cls(**{**MNIST, **overrides})

    @classmethod
    def digits(cls, **overrides) -> "LambdaResNetConfig":
        """8×8×1, 68,682 parameters, global contexts at 4×4."""
        return cls(**{**DIGITS, **overrides})

    @classmethod
    def plain_cifar(cls, **overrides) -> "LambdaResNetConfig":
        """32×32×3, 997,258 parameters, convolutions alone."""
        return cls.cifar(**{"lambda_stages": (), "widths": (64, 80, 160), **overrides})

    @classmethod
    def plain_mnist(cls, **overrides) -> "LambdaResNetConfig":
        """28×28×1, 56,266 parameters, convolutions alone."""
        return cls.mnist(**{"lambda_stages": (), "widths": (16, 44), **overrides})

    @classmethod
    def plain_digits(cls, **overrides) -> "LambdaResNetConfig":
        """8×8×1, 71,754 parameters, convolutions alone."""
        return cls.digits(**{"lambda_stages": (), "widths": (32, 44), **overrides})


RULES = {
    "size": Rule(lambda size: len(size) == 2 and min(size) > 0, "(rows, columns)"),
    **dict.fromkeys(("blocks", "widths", "strides"), ALL_POSITIVE),
    **dict.fromkeys(
        (
            *("channels", "num_classes", "expansion", "stem_width", "stem_kernel", "stem_stride"),
            *("heads", "keys", "depth"),
        ),
        POSITIVE,
    ),
    "window": Rule(lambda value: value == 0 or (value > 0 and value % 2), "0 or an odd number"),
}
# Fields of the variants for small pictures. The first map is as large as the picture, or half.
SMALL = dict(num_classes=10, expansion=2, stem_kernel=3, stem_pool=False)
CIFAR = dict(
    **SMALL, size=(32, 32), blocks=(2, 2, 2), widths=(64, 128, 256), strides=(1, 2, 2),
    lambda_stages=(1, 2), stem_width=64, stem_stride=1,
)  # fmt: skip
MNIST = dict(
    **SMALL, size=(28, 28), channels=1, blocks=(1, 2), widths=(16, 64), strides=(1, 2),
    lambda_stages=(1,), stem_width=32, stem_stride=2,
)  # fmt: skip
DIGITS = dict(
    **SMALL, size=(8, 8), channels=1, blocks=(1, 2), widths=(32, 64), strides=(1, 2),
    lambda_stages=(1,), stem_width=32, stem_stride=1,
)  # fmt: skip


class LambdaResNet(nnx.Module):
    """Classifies pictures with bottlenecks of convolutions, then of lambda layers.

    Example:
      >>> def logits(x):
      ...     model = LambdaResNet(LambdaResNetConfig.digits(), rngs=nnx.Rngs(0))
      ...     return model(x)
      >>> jax.eval_shape(logits, jnp.ones((4, 8, 8, 1))).shape
      (4, 10)

    Normalizations use the statistics of the batch in training, and running averages after `eval()`.

    Args:
      config: the configuration of the network.
      dtype: dtype of the computation, e.g. `jnp.bfloat16`; statistics and logits stay in float32 or
        wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split.
      remat: whether gradients recompute the inside of a bottleneck instead of keeping it in memory,
        which takes less memory and more time.
      rngs: the source of the initial values.

    Raises:
      ValueError: when called, for pictures of another shape.
      TypeError: when called with pictures that are not of a floating-point type.

    Source: Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", 2021; He et
    al., "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(
        self,
        config: LambdaResNetConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.remat = config, remat
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inputs = config.stem_width
        self.stem = _conv(config.channels, inputs, config.stem_kernel, config.stem_stride, **kwargs)
        self.norm = batch_norm(inputs, axis_name=axis_name, **kwargs)
        self.blocks = nnx.List()
        for stage, number in enumerate(config.blocks):
            for stride in [config.strides[stage], *[1] * (number - 1)]:
                block = Bottleneck(config, stage, inputs, stride, axis_name=axis_name, **kwargs)
                self.blocks.append(block)
                inputs = block.outputs
        self.head = pointwise(
            inputs,
            config.num_classes,
            param_dtype=param_dtype,
            promote_dtype=promote_to_float32,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `(batch, num_classes)` of floating-point `x (batch, *size, channels)`."""
        expected = (*self.config.size, self.config.channels)
        if x.shape[1:] != expected:
            raise ValueError(f"expected pictures (batch, *{expected}), got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected floating-point pictures, got {x.dtype}: scale them first")
        y = jax.nn.relu(self.norm(self.stem(x)))
        if self.config.stem_pool:
            y = nnx.max_pool(y, (3, 3), (2, 2), padding="SAME")
        apply = nnx.remat(_apply_block) if self.remat else _apply_block
        for block in self.blocks:
            y = apply(block, y)
        return self.head(jnp.mean(y, (1, 2), dtype=at_least_float32(y.dtype)))


class Bottleneck(nnx.Module):
    """Computes `relu(x + expand(context(reduce(x))))`; the context is a 3×3 convolution or lambdas.

    Args:
      config: the configuration of the network.
      stage: the index of the block's stage.
      inputs: channels of the input; the output has `outputs`.
      stride: the stride of the convolution, or of the average pooling before a lambda layer.
      axis_name: the mapped axis over which the batch is split, if any.
      kwargs: `dtype`, `param_dtype` and `rngs`.
    """

    def __init__(
        self,
        config: LambdaResNetConfig,
        stage: int,
        inputs: int,
        stride: int,
        *,
        axis_name: AxisName = None,
        **kwargs,
    ):
        width = config.widths[stage]
        self.outputs, self.stride = config.expansion * width, stride
        linear = functools.partial(pointwise, use_bias=False, **kwargs)
        norm = functools.partial(batch_norm, axis_name=axis_name, **kwargs)
        self.reduce, self.reduce_norm = linear(inputs, width), norm(width)
        if stage in config.lambda_stages:
            self.context = LambdaLayer(
                width, width, **config.scope(stage), heads=config.heads, keys=config.keys,
                depth=config.depth, axis_name=axis_name, **kwargs,
            )  # fmt: skip
        else:
            self.context = _conv(width, width, 3, stride, **kwargs)
        self.context_norm = norm(width)
        self.expand = linear(width, self.outputs)
        # With a zero scale the block starts as the identity.
        self.expand_norm = norm(self.outputs, scale_init=nnx.initializers.zeros)
        self.has_shortcut = stride > 1 or inputs != self.outputs
        if self.has_shortcut:
            self.shortcut, self.shortcut_norm = linear(inputs, self.outputs), norm(self.outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, *size, inputs)` to `(batch, *size / stride, outputs)`."""
        y = jax.nn.relu(self.reduce_norm(self.reduce(x)))
        if isinstance(self.context, LambdaLayer):
            y = _mean_pool(y, self.stride)
        y = jax.nn.relu(self.context_norm(self.context(y)))
        y = self.expand_norm(self.expand(y))
        if self.has_shortcut:
            x = self.shortcut_norm(self.shortcut(x[:, :: self.stride, :: self.stride]))
        return jax.nn.relu(x + y)


def _apply_block(block: Bottleneck, x: jax.Array) -> jax.Array:
    return block(x)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, **kwargs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        stride,
        use_bias=False,
        kernel_init=kaiming_normal,
        **kwargs,
    )


def _mean_pool(x: jax.Array, stride: int) -> jax.Array:
    """Averages squares of `stride` positions; padding at the end of a side does not count."""
    if stride == 1:
        return x
    window = (stride, stride)
    wide = x.astype(at_least_float32(x.dtype))
    return nnx.avg_pool(
        wide, window_shape=window, strides=window, padding="SAME", count_include_pad=False
    ).astype(x.dtype)
