"""The tasks: what a model is trained for, each as one class in one file.

A task opens its data, makes its model, and computes the loss and the evaluation of a batch. A new
one is a file and a line in `TASKS`.
"""

import jax
from ml_collections import ConfigDict

from terminator_jax.errors import InputError
from terminator_jax.models import make_config
from terminator_jax.training.averages import PREFIX
from terminator_jax.training.tasks.image_classification import (
    ImageClassification,
    TerminatorClassification,
)
from terminator_jax.training.tasks.masked_tokens import MaskedTokens
from terminator_jax.training.tasks.task import DeviceBatch, Task

__all__ = [
    "TASKS",
    "DeviceBatch",
    "ImageClassification",
    "MaskedTokens",
    "Task",
    "TerminatorClassification",
    "make_task",
]

# The task of each model in `models.MODELS`.
TASKS: dict[str, type[Task]] = {
    "terminator": TerminatorClassification,
    "lambda_resnet": ImageClassification,
    "nonlinear_transformer": MaskedTokens,
}


def make_task(config: ConfigDict, axis_name: str | None = None) -> Task:
    """Returns the task of a configuration; makes no model and opens no data yet.

    Args:
        config: as `config.read` gives it.
        axis_name: the mapped axis over which the batch is split, if any.

    Raises:
        InputError: if there is no such model or variant, an option does not fit, or float64 is
            asked for and off.
    """
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise InputError("config.dtype is 'float64', which needs JAX_ENABLE_X64=1")
    model = config.model
    try:
        model_config = make_config(model.name, model.variant, model.options.to_dict())
    except ValueError as error:
        raise InputError(str(error)) from error
    task = TASKS[model.name](config, model_config, axis_name)
    averaged = [PREFIX + name for name in task.metrics] if config.ema_decay else []
    if config.best_metric and config.best_metric not in (names := [*task.metrics, *averaged]):
        raise InputError(
            f"config.best_metric is {config.best_metric!r}, and must be one of {', '.join(names)}"
        )
    return task
