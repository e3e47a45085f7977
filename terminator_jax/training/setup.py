"""Everything that a run needs, put together and checked before anything is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax import loading
from terminator_jax.data import pipeline
from terminator_jax.data.examples import Batch, Examples
from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training.averages import PREFIX, averaged_parameters
from terminator_jax.training.checkpoint import Checkpoints
from terminator_jax.training.freezing import trained_parameters
from terminator_jax.training.optimizer import decay_mask, make_optimizer
from terminator_jax.training.parallel import Parallel, make_parallel, process_shard
from terminator_jax.training.state import ModelDef, TrainState, new_state, ravel, split_model
from terminator_jax.training.tasks import Task, make_task


@dataclasses.dataclass
class Run:
    """Holds the data, the model, the optimizer and the state of a run.

    Attributes:
        config: the configuration.
        parallel: the devices.
        task: what is trained for.
        train_data: the examples to train on; None for a run that is only evaluated.
        eval_data: the examples to evaluate on.
        model_def: the model without its variables.
        tx: the optimizer.
        schedule: its learning rate at each update.
        state: the state on every device; each step replaces it.
    """

    config: ConfigDict
    parallel: Parallel
    task: Task
    train_data: Examples | None
    eval_data: Examples
    model_def: ModelDef
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, without those of an incomplete update."""
        return steps_per_epoch(self.config, len(self.train_data))

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def num_parameters(self) -> int:
        """Values that are trained."""
        return self.state.params.size

    @property
    def num_frozen(self) -> int:
        """Values of the parameters that `config.freeze` leaves as they are."""
        frozen = nnx.filter_state(self.state.model_state, nnx.Param)
        return sum(leaf.size for leaf in jax.tree.leaves(frozen))

    def named_parameters(self) -> nnx.State:
        """Returns the parameters by their names, in the memory of this process."""
        return self.model_def.unravel(jax.device_get(self.state.params))

    def chosen_parameters(self) -> nnx.State:
        """Returns the parameters that `task.best_metric` scores: the last ones or their average."""
        if not self.task.best_metric.startswith(PREFIX):
            return self.named_parameters()
        params, opt_state = jax.device_get((self.state.params, self.state.opt_state))
        averages = averaged_parameters(params, opt_state, self.config.ema_decay)
        return self.model_def.unravel(np.asarray(averages))

    def load_data(self) -> None:
        """Reads all examples into memory, if the configuration says so."""
        if self.config.data.in_memory:
            self.train_data, self.eval_data = self.train_data.load(), self.eval_data.load()

    def train_batches(self) -> grain.DatasetIterator:
        """Returns this process's part of the training batches, augmented."""
        return pipeline.train_batches(self.train_data, **self._batching())

    def train_batch(self, number: int) -> Batch:
        """Returns this process's part of one training batch, counted from 0, augmented."""
        return pipeline.train_dataset(self.train_data, **self._batching())[number]

    def train_indices(self, number: int) -> np.ndarray:
        """Returns which examples are in a training batch of all processes, counted from 0."""
        config = self.config
        order = pipeline.train_order(
            len(self.train_data), config.batch_size, seed=config.seed,
            accumulate_steps=config.accumulate_steps,
        )  # fmt: skip
        return order[number]

    def _batching(self) -> dict[str, Any]:
        process = process_shard()
        return dict(
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            accumulate_steps=self.config.accumulate_steps,
            augmentations=self.task.augmentations(self.train_data, process),
            process=process,
        )

    def restore(self, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
        """Reads the state from a checkpoint; returns the position of the training batches.

        Raises:
            InputError: if the checkpoint is of another model or optimizer.
        """
        abstract = self.state._replace(params=self.model_def.params)
        state, position = checkpoints.restore(step, abstract, self.parallel.replicated)
        params = ravel(jax.device_get(state.params))
        if not jax.tree.leaves(state.model_state):
            state = state._replace(model_state=self.state.model_state)
        self.state = self.parallel.replicate(state._replace(params=params))
        return position

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        batches: grain.DatasetIterator,
        scores: dict[str, float] | None,
    ) -> None:
        """Begins to write a checkpoint: the state, the position of the batches, the scores.

        A copy is written, because the next step uses the memory of the state again. On a CPU
        `device_get` gives that memory itself, so that the parameters are copied too.
        """
        state = jax.tree.map(jnp.copy, self.state)
        params = self.model_def.unravel(jax.device_get(state.params))
        state = self.parallel.to_global(state._replace(params=params))
        checkpoints.save(step, state, batches.get_state(), scores)

    def save_model(self, workdir: Path, step: int) -> None:
        """Writes the model alone, for `terminator_jax.load_model`."""
        loading.save_model(
            workdir / loading.FILE_NAME,
            nnx.merge_state(self.chosen_parameters(), self.state.model_state),
            config=configs.to_json(self.config),
            classes=self.eval_data.classes,
            step=step,
            shape=getattr(self.eval_data, "shape", None),
        )


def steps_per_epoch(config: ConfigDict, examples: int) -> int:
    """Returns how many batches of an epoch make whole updates."""
    return examples // (config.batch_size * config.accumulate_steps) * config.accumulate_steps


def make_run(
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    *,
    classes: Sequence[str] = (),
    train: bool = True,
) -> Run:
    """Opens the data and makes model and optimizer; checks that all fit each other.

    Args:
        config: as `config.read` gives it.
        devices: by default all there are.
        classes: those of the model, if it was trained before; by default those of the data.
        train: whether the run trains; otherwise its training data need not be there.

    Raises:
        InputError: if they do not.
    """
    parallel = make_parallel(config, devices)
    task = make_task(config, parallel.axis_name)

    train_data, steps = None, 1
    if train:
        train_data = task.open(config.data.train_split, classes)
        steps = steps_per_epoch(config, len(train_data))
    eval_data = task.open(config.data.eval_split, train_data.classes if train else classes)
    if not steps:
        raise InputError(
            f"{train_data.name} has {len(train_data)} {task.unit}, and config.batch_size, "
            f"{config.batch_size}, must not be larger, also times config.accumulate_steps, "
            f"{config.accumulate_steps}"
        )

    if train:
        task.augmentations(train_data, process_shard())  # to say now if one does not fit the data
    model = task.make_model()
    trained = trained_parameters(model, config.freeze)
    model_def, params, model_state = split_model(model, trained)
    tx, schedule = make_optimizer(config, steps, decay_mask(params))
    params = jax.device_get(params)  # on the host, where raveling compiles nothing
    state = parallel.replicate(new_state(params, model_state, tx, config.seed))
    return Run(config, parallel, task, train_data, eval_data, model_def, tx, schedule, state)
