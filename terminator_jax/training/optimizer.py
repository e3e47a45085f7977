"""The optimizer of a run, with its learning rate."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.optim import kar2, kar3
from terminator_jax.training.averages import average_parameters

# Makes an optimizer from the learning rate, config.optimizer and the mask of `make_optimizer`.
OPTIMIZERS = {
    "kar3": lambda rate, config, _: kar3(rate, config.beta1, config.beta2),
    "kar2": lambda rate, config, _: kar2(rate, config.beta2),
    "sgd": lambda rate, config, _: optax.sgd(rate, config.momentum),
    "adamw": lambda rate, config, mask: _adamw(rate, config.weight_decay, mask),
}
# Parameters of these names have no weight decay, whatever their shape: stacked layers have biases
# with two axes or more.
NO_DECAY = re.compile(r"bias|scal|position")


def decay_mask(params: nnx.State) -> np.ndarray:
    """Returns which values of the parameters, as one vector, have weight decay: the weights.

    A weight has two axes or more, and no name that `NO_DECAY` finds. Biases, scales of
    normalizations and positions have no weight decay.

    Args:
        params: the parameters by their names, or their shapes.

    Returns:
        Booleans in the order of `state.ravel`.

    Example:
        >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> decay_mask(nnx.state(nnx.List(model), nnx.Param))  # bias, scale; bias, kernel
        array([False, False, False, False, False,  True,  True])
    """
    flat = nnx.to_flat_state(params)
    return np.concatenate([np.full(leaf.size, _is_weight(path, leaf)) for path, leaf in flat])


def _is_weight(path: tuple, leaf: nnx.Variable) -> bool:
    return leaf.ndim > 1 and not NO_DECAY.search(str(path[-1]))


def _adamw(
    rate: optax.Schedule, decay: float, mask: np.ndarray | bool
) -> optax.GradientTransformation:
    """Returns `optax.adamw` with a mask of values, where optax has one of whole arrays."""

    def add_decayed_weights(updates, params):
        return jax.tree.map(lambda u, p: u + decay * jnp.where(mask, p, 0), updates, params)

    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(add_decayed_weights),
        optax.scale_by_learning_rate(rate),
    )


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate: a linear warm-up from 0, then a half cosine down to 0.

    Example:
        >>> from terminator_jax.training.config import default_config, override
        >>> rate = make_schedule(override(default_config(), ["--config.epochs=4"]), 10)
        >>> [f"{rate(step):.5f}" for step in (0, 10, 20, 30, 40)]
        ['0.00000', '0.00050', '0.00100', '0.00050', '0.00000']
    """
    peak, total = config.optimizer.learning_rate, config.epochs * steps_per_epoch
    warmup = min(round(config.optimizer.warmup_epochs * steps_per_epoch), total - 1)
    cosine = optax.cosine_decay_schedule(peak, total - warmup)
    if warmup == 0:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, mask: np.ndarray | bool = True
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the configuration names, and its learning rate at each update.

    Args:
        config: as `config.read` gives it.
        steps_per_epoch: a multiple of `config.accumulate_steps`.
        mask: which parameters have weight decay, see `decay_mask`; True for all.
    """
    steps = config.accumulate_steps
    schedule = make_schedule(config, steps_per_epoch // steps)
    tx = OPTIMIZERS[config.optimizer.name](schedule, config.optimizer, mask)
    if config.optimizer.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.optimizer.clip_norm), tx)
    if config.ema_decay:
        tx = optax.chain(tx, average_parameters(config.ema_decay))
    if steps > 1:
        tx = _accumulate(tx, steps, at_least_float32(jnp.dtype(config.dtype)))
    return tx, schedule


def _accumulate(
    tx: optax.GradientTransformation, steps: int, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Returns an optimizer that updates by the mean of `steps` gradients of `dtype`."""
    kinds = {}
    # optax 0.2.8 adds float64 up in float32 unless told not to; versions before cannot be told.
    if "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters:
        kinds = dict(accumulator_dtype=dtype)
    return optax.MultiSteps(tx, steps, **kinds).gradient_transformation()
