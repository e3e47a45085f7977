"""The CIFAR network and recipe on STL-10: 5,000 training pictures of 96×96 pixels, made 32×32.

    python -m terminator_jax.train --config=experiments/stl10.py

Every picture is scaled down to 32×32 by default, because the hyper-kernels are as large as the
pictures. The full size needs `config.data.resize = 0` and `config.model.options = dict(size=(96,
96))` in a copy of this file, and about nine times the time and memory.

Reaches: no run has been made yet. Takes: not yet measured.
"""

from terminator_jax.training.config import published_recipe


def get_config():
    """What differs from `published_recipe()`."""
    config = published_recipe()
    config.data.name = "stl10"
    config.data.resize = 32
    return config
