"""The optimizer of a run, with its learning rate."""

import optax
from ml_collections import ConfigDict

from terminator_jax.optim import kar2, kar3

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
    warmup = round(config.optimizer.warmup_epochs * steps_per_epoch)
    cosine = optax.cosine_decay_schedule(peak, total - warmup)
    if warmup == 0:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer that the configuration names, and its learning rate at each step."""
    schedule = make_schedule(config, steps_per_epoch)
    return OPTIMIZERS[config.optimizer.name](schedule, config.optimizer), schedule
