"""Flax NNX layers for full-context interaction, to be used in models of your own.

Arrays are `(batch, *spatial, channels)` throughout.

| | what |
|---|---|
| `MAGNet`, `OMEGA0` | a kernel from the coordinates of its positions; their frequency scale |
| `GlobalSlowNet`, `ChannelSlowNet`, `SpatialSlowNet` | kernels as large as the map |
| `LocalSlowNet`, `LocalSlowNets` | small kernels that depend on the batch |
| `GlobalHyperZZW`, `LocalHyperZZW` | a map times the kernel that another map makes |
| `HyperZZWGate`, `FeatureSlowNet` | the same for vectors; the kernel between their features |
| `RGU` | recursive gated unit |
| `HyperChannelInteraction`, `HyperInteraction` | gates from the means of a map |
| `LocalBranch`, `LocalBranches` | local HyperZZW with what follows it in a block |
| `SFNEBlock`, `SlowWidths`, `BRANCHES` | the slow-fast neural encoding block and its defaults |
| `LocalAttention2D` | every position attends to those around it, or to all |
| `BatchStandardization`, `InstanceStandardization` | by the batch's or a sample's statistics |
| `GroupInstanceBatchStandardization` | each for every other group of channels |
| `ChannelDropout` | drops channels alike on one device and on many |
| `LambdaLayer` | global or local context as linear functions that queries are put through |
| `pointwise` | the linear layer of mixers, bottlenecks and heads |
| `SlowFast` | a network of your own that makes kernels, with a function that uses them |

`terminator_jax.layers.linen` has the same for models in Flax Linen.
"""

from terminator_jax.layers.attention import LocalAttention2D
from terminator_jax.layers.dropout import ChannelDropout
from terminator_jax.layers.hyperzzw import GlobalHyperZZW, LocalHyperZZW
from terminator_jax.layers.hyperzzw_gate import FeatureSlowNet, HyperZZWGate
from terminator_jax.layers.interactions import HyperChannelInteraction, HyperInteraction
from terminator_jax.layers.lambda_layer import LambdaLayer
from terminator_jax.layers.local import LocalBranch, LocalBranches
from terminator_jax.layers.magnet import OMEGA0, MAGNet
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.layers.rgu import RGU
from terminator_jax.layers.sfne import BRANCHES, SFNEBlock, SlowWidths
from terminator_jax.layers.slow import (
    ChannelSlowNet,
    GlobalSlowNet,
    LocalSlowNet,
    LocalSlowNets,
    SpatialSlowNet,
)
from terminator_jax.layers.slow_fast import SlowFast
from terminator_jax.layers.standardization import (
    BatchStandardization,
    GroupInstanceBatchStandardization,
    InstanceStandardization,
)

__all__ = [
    "BRANCHES",
    "OMEGA0",
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
    "LocalBranch",
    "LocalBranches",
    "LocalHyperZZW",
    "LocalSlowNet",
    "LocalSlowNets",
    "MAGNet",
    "SFNEBlock",
    "SlowFast",
    "SlowWidths",
    "SpatialSlowNet",
    "pointwise",
]
