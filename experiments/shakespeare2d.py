"""A non-linear transformer on grids of Tiny Shakespeare's bytes.

    python -m terminator_jax.train --config=experiments/shakespeare2d.py
    python -m terminator_jax.generate runs/shakespeare2d --prompt="Romeo" --at=3,12

Reaches: 2.20 nats for a byte of the validation text with half of the bytes hidden; frequencies of
bytes give 3.33, of bytes after the right one before 2.47. Takes: 29 minutes of one CPU core.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 8
    config.batch_size = 8
    config.eval_batch_size = 16
    config.log_every_steps = 100
    config.model.name = "nonlinear_transformer"
    config.model.variant = "shakespeare"
    config.data.name = "tiny_shakespeare"
    config.data.eval_split = "validation"
    config.data.grid = (8, 32)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.002
    config.optimizer.warmup_epochs = 0.5
    return config
