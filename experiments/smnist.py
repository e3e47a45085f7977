"""A small Terminator on MNIST as sequences of 784 pixels, row after row.

    python -m terminator_jax.train --config=experiments/smnist.py

Reaches: 97.8 % in these 6 epochs (`docs/results.md`). Takes: 66 minutes of one CPU core.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 6
    config.batch_size = 64
    config.eval_batch_size = 80
    config.model.variant = "smnist"
    config.data.name = "mnist"
    config.data.sequence = True
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.optimizer.learning_rate = 0.001
    config.optimizer.warmup_epochs = 0.2
    return config
