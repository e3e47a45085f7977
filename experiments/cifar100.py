"""The published network and recipe on CIFAR-100: that of CIFAR-10 with 100 classes.

    python -m terminator_jax.train --config=experiments/cifar100.py

Reaches: no run has been made yet; the author's log of the PyTorch release ends at 75.68 % after
these 100 epochs. Takes: as long as CIFAR-10.
"""

from terminator_jax.training.config import published_recipe


def get_config():
    """What differs from `published_recipe()`."""
    config = published_recipe()
    config.model.options = dict(num_classes=100)
    config.data.name = "cifar100"
    return config
