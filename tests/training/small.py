"""A model that compiles in a moment, on the digits: its own line in the table of models."""

import dataclasses
import math

from flax import nnx

from terminator_jax.models import MODELS, ModelEntry
from terminator_jax.training import tasks
from terminator_jax.training.config import default_config


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    size: tuple[int, ...] = (8, 8)
    channels: int = 1
    num_classes: int = 10
    dropout: float = 0.0
    normalize: bool = True


class Small(nnx.Module):
    """Linear, with an ordinary dropout and, if it normalizes, running averages."""

    def __init__(self, config, *, dtype, param_dtype, axis_name, remat, rngs):
        del remat
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inputs = math.prod(config.size) * config.channels
        if config.normalize:
            self.norm = nnx.BatchNorm(inputs, axis_name=axis_name, **kinds)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.linear = nnx.Linear(inputs, config.num_classes, **kinds)

    def __call__(self, pictures):
        x = pictures.reshape(pictures.shape[0], -1)  # len() takes no batch of unknown size
        x = self.norm(x) if hasattr(self, "norm") else x
        return self.linear(self.dropout(x))


def get_config():
    MODELS["small"] = ModelEntry(Small, {"small": SmallConfig})
    tasks.TASKS["small"] = tasks.ImageClassification
    config = default_config()
    config.epochs = 2
    config.eval_batch_size = 80
    config.compilation_cache = False
    config.model.name = config.model.variant = "small"
    config.data.name = "digits"
    config.data.mean = (0.305,)
    config.data.std = (0.376,)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.003
    config.optimizer.warmup_epochs = 1.0
    return config
