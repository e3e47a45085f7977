"""One product of many maps, each of which is made on the way: what a bottleneck is.

Maps are channel-major, see `channel_major.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops.channel_major import contract, gather, positions, product, vary_alike
from terminator_jax.ops.order import after, after_product


class Made(NamedTuple):
    """A map as what it is made from: `function(*arguments)`.

    Attributes:
      function: of arrays; None if the map is the only argument itself.
      arguments: all that is worth computing again uses something of the last of them.
    """

    function: Callable[..., jax.Array] | None
    arguments: tuple[Any, ...]


def joined_product(kernel: jax.Array, maps: Sequence[Made]) -> jax.Array:
    """`product` of maps joined along their channels.

    On a CPU gradients make the maps again, which may be much larger than what they are made of: one
    after the other, each freed with its gradient before the next is made.

    Args:
      kernel: `(inputs, outputs)`, its rows in the order of the maps.
      maps: the first best the largest.

    Returns:
      `(outputs, batch, *spatial)`.
    """
    functions, arguments = (tuple(each) for each in zip(*maps, strict=True))
    leaves, tree = jax.tree.flatten((kernel, arguments))
    kernel, arguments = jax.tree.unflatten(tree, vary_alike(*leaves))
    if jax.default_backend() == "cpu":
        return _one_by_one(functions, kernel, arguments)
    return product(kernel, _joined(functions, arguments))


def _joined(functions: Sequence[Callable | None], arguments: Sequence[tuple]) -> jax.Array:
    """The maps, made and joined."""
    pairs = zip(functions, arguments, strict=True)
    return gather([make(*own) if make else own[0] for make, own in pairs])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_by_one(
    functions: tuple[Callable | None, ...], kernel: jax.Array, arguments: tuple[tuple, ...]
) -> jax.Array:
    """`joined_product` with products of its own for the gradient of each map."""
    # The first, often the largest, has one of its own here too: it is not worth a copy.
    first, rest = (_joined(functions[part], arguments[part]) for part in (slice(1), slice(1, None)))
    own, other = jnp.split(kernel, [len(first)])
    out = product(own, positions(first)) + product(other, positions(rest))
    return out.reshape(-1, *first.shape[1:])


def _forward(functions, kernel, arguments):
    return _one_by_one(functions, kernel, arguments), (kernel, arguments)


def _backward(functions, residuals, dy):
    kernel, arguments = residuals
    flat, done, start = positions(dy), dy, 0
    dkernels, darguments = [], []
    for function, own in zip(functions, arguments, strict=True):
        # XLA would join products with a factor in common, and take what the forward pass made.
        late = (*own[:-1], jax.tree.map(functools.partial(after, done), own[-1]))
        x, pullback = jax.vjp(lambda *own, f=function: _joined([f], [own]), *late)
        rows = kernel[start : start + len(x)]
        start += len(x)
        dkernels.append(contract(positions(x), flat, (1,), (1,)))
        # Second, when nothing needs the map any more.
        dx = contract(after_product(dkernels[-1], rows), flat, (1,), (0,))
        darguments.append(pullback(dx.reshape(x.shape)))
        done = min(jax.tree.leaves(darguments[-1]), key=lambda leaf: leaf.size)
    return jnp.concatenate(dkernels), tuple(darguments)


_one_by_one.defvjp(_forward, _backward)
