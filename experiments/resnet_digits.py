r"""As `lambda_digits.py`, a residual network of about as many parameters without lambda layers.

    python -m terminator_jax.train \
        --config=experiments/resnet_digits.py --workdir=runs/resnet_digits

Reaches: all 360 of the held-out fifth at the end. Takes: 51 seconds of one CPU core, compiling
included. Needs no network.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 40
    config.batch_size = 64
    config.eval_batch_size = 72
    config.model.name = "lambda_resnet"
    config.model.variant = "plain_digits"
    config.data.name = "digits"
    config.data.mean = (0.306,)
    config.data.std = (0.376,)
    config.data.padding = 1
    config.data.padding_mode = "zeros"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.warmup_epochs = 4.0
    config.optimizer.weight_decay = 0.3
    return config
