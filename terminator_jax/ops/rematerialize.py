"""Gradients that compute a function again in place of keeping what it computed on its way."""

from collections.abc import Callable
from typing import Any

import jax

from terminator_jax.ops.channel_major import vary_alike
from terminator_jax.ops.order import after, stored


def rematerialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which a gradient keeps the arguments only.

    As `jax.checkpoint`, whose second computation XLA finds to be the first one on CPUs: here what
    the first argument is used for needs the gradient of the result, and so cannot be. For reverse
    mode only.

    Args:
      function: from pytrees of floating-point arrays to a pytree of such. All that is worth
        computing again has to use something of its first argument; it waits for the gradient of
        the first array of the result.

    Example:
      >>> import jax.numpy as jnp
      >>> print(jax.grad(rematerialized(lambda x: jnp.sum(x**3)))(jnp.arange(3.0)))
      [ 0.  3. 12.]
    """

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    def forward(*arguments):
        return function(*arguments), arguments

    def backward(arguments, dy):
        first, *rest = arguments
        done, *_ = jax.tree.leaves(dy)
        late = jax.tree.map(lambda x: stored(after(done, x)), first)
        return jax.vjp(function, late, *rest)[1](dy)

    call.defvjp(forward, backward)

    def alike(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        return call(*jax.tree.unflatten(tree, vary_alike(*leaves)))

    return alike


def rematerialized_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`rematerialized` on CPUs, elsewhere the function as it is.

    For what is mere passes over memory: the compilers of TPUs compute that inside of products, and
    a program for them moves and keeps more if told to do it again.
    """
    return rematerialized(function) if jax.default_backend() == "cpu" else function
