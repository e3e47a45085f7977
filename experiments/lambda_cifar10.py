"""A LambdaResNet of 1.0 million parameters on CIFAR-10, shifted and mirrored.

    python -m terminator_jax.train --config=experiments/lambda_cifar10.py

Reaches: no run has been made yet. Takes: not yet measured.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 60
    config.batch_size = 128
    config.eval_batch_size = 200
    config.model.name = "lambda_resnet"
    config.model.variant = "cifar"
    config.data.name = "cifar10"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.padding = 4
    config.data.flip = True
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.002
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 0.05
    return config
