"""What all tasks share: `Task`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax.data.augment import Process
from terminator_jax.data.examples import Examples
from terminator_jax.errors import InputError
from terminator_jax.models import MODELS
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.training.averages import PREFIX
from terminator_jax.training.metrics import METRICS, Metrics

# Arrays of n examples, by name, on the devices.
DeviceBatch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds what all tasks share.

    Attributes:
        config: the configuration of the run.
        model_config: the configuration of the model.
        axis_name: the mapped axis over which the batch is split, if any.
        unit: what an example is called.
        unit_of_speed: what the log counts by the second.
        unit_of_evaluation: what an evaluation counts.
        default_best_metric: the metric that decides which checkpoint is the best one.
        classifies: whether an example has one label, and a method `logits` gives its logits: then
            it is also evaluated class by class.
    """

    config: ConfigDict
    model_config: Any
    axis_name: str | None = None

    unit: ClassVar[str]
    unit_of_speed: ClassVar[str]
    unit_of_evaluation: ClassVar[str]
    default_best_metric: ClassVar[str]
    classifies: ClassVar[bool] = False

    def open(self, split: str, classes: Sequence[str] = ()) -> Examples:
        """Opens a split of the data set.

        Args:
            split: its name.
            classes: those of the model, which the classes of the data are matched with; none for a
                model that takes those of the data.

        Raises:
            InputError: if there is no such split, or it does not fit the model.
        """
        raise NotImplementedError

    def augmentations(
        self, examples: Examples, process: Process
    ) -> Sequence[grain.transforms.RandomMap]:
        """Returns the augmentations of training batches, in their order; none by default."""
        del examples, process
        return ()

    def loss(
        self, model: nnx.Module, batch: DeviceBatch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss of a training batch.

        Returns:
            The loss, and what is logged: `loss` and other means over the batch.
        """
        raise NotImplementedError

    def eval_step(self, model: nnx.Module, batch: DeviceBatch) -> Metrics:
        """Computes the sums of `metrics` over an evaluation batch without its padding.

        Returns:
            `count` and a sum for each metric.
        """
        raise NotImplementedError

    def diagnostics(self, model: nnx.Module, batch: DeviceBatch) -> Metrics:
        """Computes what shows how the inside of a model in training mode does, by name."""
        del model, batch
        return {}

    def baselines(self, evaluation: Examples) -> dict[str, float]:
        """Computes losses that need no model, by name, of the same evaluation."""
        del evaluation
        return {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what `eval_step` sums, besides `count`, in the order of printing."""
        return tuple(METRICS)

    @property
    def best_metric(self) -> str:
        """The metric of an evaluation that decides which checkpoint is the best one.

        With a moving average of the parameters it is by default the average's.
        """
        prefix = PREFIX if self.config.ema_decay else ""
        return self.config.best_metric or prefix + self.default_best_metric

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the computation."""
        return jnp.dtype(self.config.dtype)

    def make_model(self) -> nnx.Module:
        """Makes the model; the seed decides its initial values.

        Raises:
            InputError: if the model's options do not fit each other.
        """
        seed = self.config.seed
        try:
            return MODELS[self.config.model.name].module(
                self.model_config,
                dtype=self.dtype,
                param_dtype=at_least_float32(self.dtype),
                axis_name=self.axis_name,
                remat=self.config.remat,
                rngs=nnx.Rngs(params=seed, dropout=seed),
            )
        except ValueError as error:
            raise InputError(f"config.model.options: {error}") from error
