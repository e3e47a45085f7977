"""The optimizer of a run, with its learning rate."""

import inspect

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.optim import kar2, kar3
from terminator_jax.training.averages import average_parameters

# Makes an optimizer from the learning rate and config.optimizer.
OPTIMIZERS = {
    "kar3": lambda rate, config: kar3(rate, config.beta1, config.beta2),
    "kar2": lambda rate, config: kar2(rate, config.beta2),
    "sgd": lambda rate, config: optax.sgd(rate, config.momentum),
    "adamw": lambda rate, config: optax.adamw(rate, weight_decay=config.weight_decay),
}


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
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the configuration names, and its learning rate at each update.

    Args:
        config: as `config.read` gives it.
        steps_per_epoch: a multiple of `config.accumulate_steps`.
    """
    steps = config.accumulate_steps
    schedule = make_schedule(config, steps_per_epoch // steps)
    tx = OPTIMIZERS[config.optimizer.name](schedule, config.optimizer)
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
