"""A small Terminator on the bundled digits as sequences of 64 pixels.

    python -m terminator_jax.train --config=experiments/sdigits.py --workdir=runs/sdigits

Reaches: 99.4 % on the held-out fifth. Takes: three minutes on 2 CPU cores, one of them compiling.
Needs no network.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 30
    config.batch_size = 64
    config.eval_batch_size = 72
    config.model.variant = "sdigits"
    config.data.name = "digits"
    config.data.sequence = True
    config.data.mean = (0.306,)
    config.data.std = (0.376,)
    config.data.padding = 1
    config.data.padding_mode = "zeros"
    config.optimizer.learning_rate = 0.001
    config.optimizer.warmup_epochs = 3.0
    return config
