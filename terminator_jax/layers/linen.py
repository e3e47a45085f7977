"""The layers as Flax Linen modules: the same names, arguments and calls, but without `rngs`.

Example:
  >>> import jax
  >>> class Net(nn.Module):
  ...     @nn.compact
  ...     def __call__(self, x):
  ...         return ChannelDropout(0.1)(RGU((8, 8), 12)(x))
  >>> net, x = Net(), jnp.ones((2, 8, 8, 12))
  >>> variables = net.init(jax.random.key(0), x)
  >>> list(variables), list(variables["params"])
  (['params'], ['RGU_0'])
  >>> net.apply(variables, x).shape  # drops nothing without a key for it
  (2, 8, 8, 12)
  >>> net.apply(variables, x, rngs={"dropout": jax.random.key(1)}).shape
  (2, 8, 8, 12)

The parameters are those of the NNX layer, `nnx.to_pure_dict(nnx.state(layer, nnx.Param))`, and
running statistics lie in `batch_stats`, as Linen's own do. `apply` takes exactly these: it raises
ValueError where some are missing, left over or of another shape.

`pointwise` is an `nn.Dense`, and `SlowFast` joins Linen modules: there Linen's own checks hold.
What is no layer, as `SlowWidths` or `BRANCHES`, comes from `terminator_jax.layers`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from terminator_jax import layers
from terminator_jax.layers.initializers import kaiming_normal
from terminator_jax.layers.running import use_batch_statistics
from terminator_jax.layers.slow_fast import kernel_from_coordinates
from terminator_jax.ops.dtypes import floating

__all__ = [
    "RGU",
    "BatchStandardization",
    "ChannelDropout",
    "ChannelSlowNet",
    "FeatureSlowNet",
    "GlobalHyperZZW",
    "GlobalSlowNet",
    "GroupInstanceBatchStandardization",
    "HyperChannelInteraction",
    "HyperInteraction",
    "HyperZZWGate",
    "InstanceStandardization",
    "LambdaLayer",
    "LocalAttention2D",
    "LocalBranches",
    "LocalHyperZZW",
    "LocalSlowNet",
    "LocalSlowNets",
    "MAGNet",
    "SFNEBlock",
    "SlowFast",
    "SpatialSlowNet",
    "pointwise",
]


# Linen's collections, and what NNX calls the variables in them.
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class Layer(nn.Module):
    """Wraps a layer of `terminator_jax.layers`, built anew in every call around Linen's parameters.

    Attributes:
      layer: its NNX class; the fields are the arguments of its constructor.
      random: whether that also takes `rngs`.
    """

    layer: ClassVar[type[nnx.Module]]
    random: ClassVar[bool]

    @nn.compact
    def __call__(self, *args, **kwargs):
        """As the NNX layer; where that takes `rngs`, it gets the key for `dropout`, if any."""
        given = {name: self.variables.get(name, {}) for name in COLLECTIONS}
        initializing = self.is_initializing() and not given["params"]
        if initializing:
            layer = self._make(self.make_rng("params") if self.random else None)
            self._put(layer)
            use_batch_statistics(layer)  # there are no averages yet
        else:
            layer = nnx.eval_shape(lambda: self._make(0))
            for collection, values in given.items():
                _fill(layer, collection, values, "/".join(self.path) or type(self).__name__)
        if "rngs" in inspect.signature(self.layer.__call__).parameters and self.has_rng("dropout"):
            kwargs["rngs"] = nnx.Rngs(dropout=self.make_rng("dropout"))
        before = _nested(layer, "batch_stats")
        out = layer(*args, **kwargs)
        if not initializing and not _same(before, _nested(layer, "batch_stats")):
            self._put(layer, "batch_stats")
        return out

    @nn.nowrap
    def _put(self, layer: nnx.Module, *collections: str) -> None:
        """Gives Linen the layer's variables, by default all."""
        for collection in collections or COLLECTIONS:
            for name, value in _nested(layer, collection).items():
                self.put_variable(collection, name, value)

    @nn.nowrap
    def _make(self, key: Any) -> nnx.Module:
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("parent", "name")]
        rngs = dict(rngs=nnx.Rngs(params=key)) if self.random else {}
        return self.layer(**{name: getattr(self, name) for name in names}, **rngs)


def _variables(layer: nnx.Module, collection: str) -> dict[str, nnx.Variable]:
    """Returns the variables of a collection by their paths, as in `rgu1/k/kernel`."""
    flat = nnx.to_flat_state(nnx.state(layer, COLLECTIONS[collection]))
    return {"/".join(map(str, path)): variable for path, variable in flat}


def _nested(layer: nnx.Module, collection: str) -> dict[str, Any]:
    """Returns their values as Linen keeps them."""
    flat = {k: v.get_value() for k, v in _variables(layer, collection).items()}
    return unflatten_dict(flat, sep="/")


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Returns whether these are the same arrays."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(a is b for a, b in pairs)


def _fill(layer: nnx.Module, collection: str, given: Mapping[str, Any], name: str) -> None:
    """Gives a layer without values those of a collection, which must be just what it needs."""
    wanted = _variables(layer, collection)
    found = {"/".join(map(str, path)): value for path, value in flatten_dict(given).items()}
    what = {"params": "parameters"}.get(collection, collection)
    wrong = [f"{k} {v.shape} is missing" for k, v in wanted.items() if k not in found]
    for k, value in found.items():
        if k not in wanted:
            wrong.append(f"{k} {jnp.shape(value)} is not one of its {what}")
        elif jnp.shape(value) != wanted[k].shape:
            wrong.append(f"{k} must be {wanted[k].shape}, got {jnp.shape(value)}")
    if wrong:
        raise ValueError(f"wrong {what} for {name}: {'; '.join(wrong)}")
    for k, variable in wanted.items():
        variable.set_value(found[k])


def _arguments(layer: type[nnx.Module]) -> dict[str, inspect.Parameter]:
    """Returns the constructor's arguments by name, without those of a `**kwargs`."""
    _, *parameters = inspect.signature(layer.__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}


def _module(layer: type[nnx.Module], passed_on: Iterable[inspect.Parameter] = ()) -> type[Layer]:
    """Makes the Linen module of a layer; `passed_on` are the `**kwargs` of its constructor."""
    arguments = {p.name: p for p in passed_on} | _arguments(layer)
    random = arguments.pop("rngs", None) is not None
    defaults = {
        name: dataclasses.field(default=p.default, kw_only=p.kind is p.KEYWORD_ONLY)
        for name, p in arguments.items()
        if p.default is not p.empty
    }
    return type(
        layer.__name__,
        (Layer,),
        {
            "__annotations__": {
                name: Any if p.annotation is p.empty else p.annotation
                for name, p in arguments.items()
            },
            "__doc__": f"`terminator_jax.layers.{layer.__name__}` as a Linen module.",
            "__module__": __name__,
            "layer": layer,
            "random": random,
            **defaults,
        },
    )


_MAGNET = [_arguments(layers.MAGNet)[name] for name in ("omega0", "param_dtype", "rngs")]
_LOCAL = [p for p in _arguments(layers.LocalSlowNets).values() if p.kind is p.KEYWORD_ONLY]

RGU = _module(layers.RGU)
BatchStandardization = _module(layers.BatchStandardization)
ChannelDropout = _module(layers.ChannelDropout)
ChannelSlowNet = _module(layers.ChannelSlowNet, _MAGNET)
FeatureSlowNet = _module(layers.FeatureSlowNet)
GlobalHyperZZW = _module(layers.GlobalHyperZZW)
GlobalSlowNet = _module(layers.GlobalSlowNet)
GroupInstanceBatchStandardization = _module(layers.GroupInstanceBatchStandardization)
HyperChannelInteraction = _module(layers.HyperChannelInteraction, _MAGNET)
HyperInteraction = _module(layers.HyperInteraction, _MAGNET)
HyperZZWGate = _module(layers.HyperZZWGate)
InstanceStandardization = _module(layers.InstanceStandardization)
LambdaLayer = _module(layers.LambdaLayer)
LocalAttention2D = _module(layers.LocalAttention2D)
LocalBranches = _module(layers.LocalBranches)
LocalHyperZZW = _module(layers.LocalHyperZZW)
LocalSlowNet = _module(layers.LocalSlowNet, _LOCAL)
LocalSlowNets = _module(layers.LocalSlowNets)
MAGNet = _module(layers.MAGNet)
SFNEBlock = _module(layers.SFNEBlock)
SpatialSlowNet = _module(layers.SpatialSlowNet, _MAGNET)


class SlowFast(nn.Module):
    """`terminator_jax.layers.SlowFast` of Linen modules, or of functions.

    Example:
      >>> import jax
      >>> slow = nn.Sequential([nn.Dense(16), jnp.sin, nn.Dense(12)])
      >>> layer = SlowFast(slow, lambda kernel, x: x * kernel[None], size=(8, 8))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 12)))
      >>> y.shape
      (2, 8, 8, 12)
      >>> layer.apply(variables, (4, 4), method="kernel").shape
      (4, 4, 12)
    """

    slow: Callable[[jax.Array], jax.Array]
    fast: Callable[..., Any]
    size: tuple[int, ...]
    dtype: Any = dataclasses.field(default=jnp.float32, kw_only=True)

    def __call__(self, *inputs, size: tuple[int, ...] | None = None, **options) -> Any:
        """Computes `fast(kernel, *inputs, **options)`; `size` is that of the kernel."""
        return self.fast(self.kernel(size), *inputs, **options)

    def kernel(self, size: tuple[int, ...] | None = None) -> jax.Array:
        """Generates the kernel, `(*size, features)`; of the layer's own size by default."""
        return kernel_from_coordinates(self.slow, self.size if size is None else size, self.dtype)


def pointwise(outputs: int, **kwargs) -> nn.Dense:
    """Makes `terminator_jax.layers.pointwise` as an `nn.Dense`, which needs no number of inputs.

    Example:
      >>> import jax
      >>> variables = pointwise(24).init(jax.random.key(0), jnp.ones((2, 8, 8, 12)))
      >>> variables["params"]["kernel"].shape
      (12, 24)
    """
    defaults = dict(kernel_init=kaiming_normal, promote_dtype=promote_dtype)
    return nn.Dense(outputs, **defaults | kwargs)


def promote_dtype(*arrays, **options):
    """Promotes arrays to one dtype as Linen does, integers also where promotion is strict."""
    return nn.dtypes.promote_dtype(*floating(arrays), **options)
