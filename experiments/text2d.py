"""A tiny non-linear transformer on forty sonnets of Shakespeare, which are bundled.

    python -m terminator_jax.train --config=experiments/text2d.py
    python -m terminator_jax.generate runs/text2d --prompt="my love" --at=7,5

Reaches: 2.49 nats for a byte of the last sonnets with half of the bytes hidden; frequencies of
bytes give 3.09, of bytes after the right one before 2.33: the text is short. Takes: 3 minutes of
one CPU core. Needs no network.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 60
    config.batch_size = 8
    config.eval_batch_size = 11
    config.model.name = "nonlinear_transformer"
    config.model.variant = "tiny"
    config.data.name = "sonnets"
    config.data.grid = (16, 16)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.warmup_epochs = 5.0
    return config
