"""A small LambdaResNet on the bundled digits of scikit-learn (1,797 pictures of 8×8 pixels).

    python -m terminator_jax.train --config=experiments/lambda_digits.py

Reaches: 99.4 % on the held-out fifth (358 of 360), at the end and at best. Takes: 42 seconds of one
CPU core, compiling included (2026-12-01). Needs no network.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 40
    config.batch_size = 64
    config.eval_batch_size = 72
    config.model.name = "lambda_resnet"
    config.model.variant = "digits"
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
