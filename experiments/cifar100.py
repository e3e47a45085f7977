"""The published network and recipe on CIFAR-100: that of CIFAR-10 with 100 classes.

    python -m terminator_jax.train --config=experiments/cifar100.py --workdir=runs/cifar100

Reaches: no run has been made yet; the author's log of the PyTorch release ends at 75.68 % after
these 100 epochs. Takes: as long as CIFAR-10.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 100
    config.batch_size = 64
    config.eval_batch_size = 80
    config.model.variant = "cifar"
    config.model.options = dict(num_classes=100)
    config.data.name = "cifar100"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.padding = 4
    config.data.padding_mode = "symmetric"
    config.data.flip = True
    config.optimizer.name = "kar3"
    config.optimizer.learning_rate = 0.001215
    config.optimizer.warmup_epochs = 8.0
    return config
