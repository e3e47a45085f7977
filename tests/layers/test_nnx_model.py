"""Layers in a model of someone else's, trained as the Flax guides have it."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from terminator_jax.layers import (
    GlobalHyperZZW,
    InstanceStandardization,
    LocalBranch,
    SFNEBlock,
    SlowWidths,
    pointwise,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

WIDTHS = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})

# Biases before a standardization change no result: their gradients are 0, or what is rounded.
STANDARDIZED_AWAY = {
    "block/bottleneck/bias",
    "block/local/mixer_bias",
    "block/local/scalar",
    "block/mixer/bias",
    "block/rgu1/y/bias",
    "block/rgu2/y/bias",
}


class Net(nnx.Module):
    """Flax's own layers and ours."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 12, (3, 3), rngs=rngs)
        self.context = GlobalHyperZZW((8, 8), 12, hidden=8, rngs=rngs)
        self.norm = InstanceStandardization()
        self.block = SFNEBlock(
            (8, 8), 12, factor=2, branches=[LocalBranch(3, "x", "h")], widths=WIDTHS, dropout=0.1,
            rngs=rngs,
        )  # fmt: skip
        self.head = pointwise(24, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.norm(self.stem(x))
        x = self.block(self.context(x, x), rngs=rngs)
        return self.head(x.mean((1, 2)))


def test_an_nnx_model_trains(digits):
    """With `nnx.Optimizer` and `nnx.jit`; what can moves, and compiling once is enough."""
    net, rngs = Net(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    optimizer = nnx.Optimizer(net, optax.adam(0.03), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    traces = []

    @nnx.jit
    def step(net, optimizer, rngs, images, labels):
        traces.append(images.shape)

        def loss(net, rngs):
            logits = net(images, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(net, rngs)
        optimizer.update(net, grads)
        return value

    losses = [float(step(net, optimizer, rngs, *batch)) for batch in digits.batches(steps=50)]
    logits = nnx.jit(lambda net, images: net(images))(net, digits.test_images)
    digits.check(losses, logits)
    assert len(traces) == 1
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    still = {"/".join(path) for path, changed in flatten_dict(moved).items() if not changed}
    assert still <= STANDARDIZED_AWAY
