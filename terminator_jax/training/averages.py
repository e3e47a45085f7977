"""Exponential moving average of the parameters, kept in the state of the optimizer.

There it is checkpointed and resumed as everything else of the optimizer. Its metrics are named as
those of the parameters themselves, after a prefix: `ema_accuracy` beside `accuracy`.
"""

import jax
import jax.numpy as jnp
import optax

from terminator_jax.training.state import TrainState

PREFIX = "ema_"


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters and changes no update.

    Args:
        decay: the weight of the average in a step, in [0, 1).

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), average_parameters(0.5))
        >>> params = jax.numpy.array(3.0)
        >>> _, state = tx.update(jax.numpy.array(1.0), tx.init(params), params)
        >>> print(averaged_parameters(params, state, 0.5))  # after the step, 3 - 1
        2.0
    """
    ema = optax.ema(decay)

    def update(
        updates: optax.Updates, state: optax.EmaState, params: optax.Params
    ) -> tuple[optax.Updates, optax.EmaState]:
        _, state = ema.update(optax.apply_updates(params, updates), state)
        return updates, state

    return optax.GradientTransformation(ema.init, update)


def averaged_parameters(params: jax.Array, opt_state: optax.OptState, decay: float) -> jax.Array:
    """Returns the average that `average_parameters` keeps; before the first update the parameters.

    It is divided by the sum of its weights, so that the zeros that it began with do not count.
    """
    ema = optax.tree.get(opt_state, "EmaState")
    average = optax.tree.bias_correction(ema.ema, decay, jnp.maximum(ema.count, 1))
    return jnp.where(ema.count > 0, average, params)


def with_averages(state: TrainState, decay: float) -> TrainState:
    """Returns the state with the averaged parameters in place of the parameters."""
    return state._replace(params=averaged_parameters(state.params, state.opt_state, decay))
