"""The published network's blocks on CIFAR-10 as sequences of 1,024 pixels of three colours.

    python -m terminator_jax.train --config=experiments/scifar10.py

Reaches: nobody has run it yet. Takes: days on a CPU; it is meant for a GPU or TPU.
"""

from terminator_jax.training.config import published_recipe


def get_config():
    """What differs from `published_recipe()`."""
    config = published_recipe()
    config.model.variant = "scifar"
    config.data.name = "cifar10"
    config.data.sequence = True
    return config
