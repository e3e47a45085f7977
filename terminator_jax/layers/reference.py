"""The SFNE block as it is written down: channels last, one line a formula, nothing shared.

`SFNEBlock` computes the same faster; tests compare the two.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.sfne import SFNEBlock
from terminator_jax.ops import hyperzzw
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.standardize import group_standardize, instance_standardize

OPERATORS = {
    "dot": hyperzzw.dot,
    "product": hyperzzw.product,
    "convolution": hyperzzw.convolution,
}


def sfne_reference(
    block: SFNEBlock,
    x: jax.Array,
    skips: Sequence[jax.Array] = (),
    *,
    rngs: nnx.Rngs | None = None,
) -> jax.Array:
    """What `block(x, skips, rngs=rngs)` returns, `(batch, *size, C)` to `(batch, *size, λC)`."""
    maps = _maps(block, x, block.slow_net().astype(x.dtype)[None])
    for n, skip in enumerate(skips, start=1):
        repeats = (1,) * (x.ndim - 1) + (block.channels // skip.shape[-1],)
        maps[f"skip{n}"] = jnp.tile(skip, repeats)
    y = block.bottleneck(jnp.concatenate([maps[name] for name in block.order], axis=-1))
    y = group_standardize(y, groups=block.groups, causal=block.causal, axis_name=block.axis_name)
    y = gelu(y) + block.bias[...].astype(y.dtype)
    return block.dropout(y, rngs=rngs)


def _maps(block: SFNEBlock, x: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
    operate = OPERATORS[block.operator]
    if block.operator == "convolution":
        operate = functools.partial(operate, causal=block.causal)
    standardize = functools.partial(instance_standardize, causal=block.causal)
    hyper = x * kernel
    f = standardize(block.rgu2(hyper) + block.rgu1(x))
    u = standardize(block.mixer(x))
    h = standardize(block.channel_interaction(x))
    o, o_u, o_h = (block.operator_scale * operate(hyper, z) for z in (f, u, h))
    s = jax.nn.sigmoid(o) * o
    i = block.hyper_interaction(o, x)
    local = block.local(dict(x=x, u=u, h=h))
    names = {f"l{n + 1}": m for n, m in enumerate(local)}
    return dict(o=o, f=f, o_u=o_u, s=s, o_h=o_h, i=i, **names)
