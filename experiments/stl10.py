"""The CIFAR network and recipe on STL-10: 5,000 training pictures of 96×96 pixels, made 32×32.

    python -m terminator_jax.train --config=experiments/stl10.py --workdir=runs/stl10

Every picture is scaled down to 32×32 by default, because the hyper-kernels are as large as the
pictures. The full size needs `config.data.resize = 0` and `config.model.options = dict(size=(96,
96))` in a copy of this file, and about nine times the time and memory.

Reaches: no run has been made yet. Takes: not yet measured.
"""

from terminator_jax.training.config import default_config


def get_config():
    """What differs from `default_config()`."""
    config = default_config()
    config.epochs = 100
    config.batch_size = 64
    config.eval_batch_size = 80
    config.model.variant = "cifar"
    config.data.name = "stl10"
    config.data.resize = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.padding = 4
    config.data.padding_mode = "symmetric"
    config.data.flip = True
    config.optimizer.name = "kar3"
    config.optimizer.learning_rate = 0.001215
    config.optimizer.warmup_epochs = 8.0
    return config
