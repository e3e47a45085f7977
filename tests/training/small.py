"""A model that compiles in a moment, on the digits: its own line in the table of models."""

import dataclasses

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


class Small(nnx.Module):
    """Linear, with running averages and an ordinary dropout."""

    def __init__(self, config, *, dtype, param_dtype, axis_name, remat, rngs):
        del param_dtype, remat
        self.norm = nnx.BatchNorm(64, dtype=dtype, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.linear = nnx.Linear(64, config.num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, pictures):
        x = self.norm(pictures.reshape(len(pictures), -1))
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
