"""Everything that a run needs, put together and checked before anything is written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax import loading
from terminator_jax.data.errors import InputError
from terminator_jax.data.pipeline import Examples
from terminator_jax.training import config as configs
from terminator_jax.training.examples import EXAMPLES, Source
from terminator_jax.training.optimizer import make_optimizer
from terminator_jax.training.parallel import Parallel, make_parallel
from terminator_jax.training.state import Structure, TrainState, new_state, pack, split
from terminator_jax.training.task import Task, make_task


class Run(NamedTuple):
    """What a run needs.

    Attributes:
        config: the configuration.
        mode: the devices.
        task: the model and its loss.
        train: the pictures, or other examples, to train on.
        eval: those to evaluate on.
        structure: the model but for its numbers.
        solver: the optimizer.
        schedule: its learning rate as a function of the step.
        like: shapes and dtypes of the state as checkpoints have it, see `named`.
    """

    config: ConfigDict
    mode: Parallel
    task: Task
    train: Examples
    eval: Examples
    structure: Structure
    solver: optax.GradientTransformation
    schedule: optax.Schedule
    like: TrainState

    @property
    def source(self) -> Source:
        """What kind of examples these are."""
        return EXAMPLES[self.task.family.kind]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split."""
        return len(self.train) // self.config.batch_size

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(x.size for x in jax.tree.leaves(self.like.params))

    def new_state(self) -> TrainState:
        """The state before the first step, on every device."""
        _, params, other = split(self.task.make_model())
        # Packed in the memory of this process: without a program for each shape.
        state = new_state(jax.device_get(params), other, self.solver, self.config.seed)
        return self.mode.replicate(state)

    def save_model(self, workdir: Path, state: TrainState, step: int) -> None:
        """Writes the model alone, for `terminator_jax.load_model`."""
        variables = nnx.merge_state(self.structure.unpack(np.asarray(state.params)), state.other)
        loading.save_model(
            workdir / loading.FILE_NAME, variables,
            config=configs.to_json(self.config), classes=self.train.classes,
            step=step,
        )  # fmt: skip

    def named(self, state: TrainState) -> TrainState:
        """The state as checkpoints have it, in the memory of this process.

        Its parameters by their names, and in their order what the optimizer has of each.
        """
        return state._replace(
            params=self.structure.unpack(np.asarray(state.params)),
            opt_state=self._each_vector(state.opt_state, self.structure.listed),
        )

    def packed(self, state: TrainState) -> TrainState:
        """The state as steps take it, from `named`."""
        params = pack(jax.tree.map(np.asarray, state.params))
        opt_state = self._each_vector(state.opt_state, self.structure.packed)
        return self.mode.replicate(state._replace(params=params, opt_state=opt_state))

    def _each_vector(
        self, opt_state: optax.OptState, change: Callable[[np.ndarray], np.ndarray]
    ) -> optax.OptState:
        """The optimizer's state with that changed which has as many numbers as the parameters."""
        shape = (self.num_parameters,)
        return jax.tree.map(lambda x: change(np.asarray(x)) if x.shape == shape else x, opt_state)

    def read(self, split: Examples) -> Examples:
        """The examples of a split: in memory where the configuration wants that."""
        return split.load() if self.config.data.in_memory else split


def make_run(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Opens the data set and checks that data, model and devices fit each other.

    Args:
        config: as `config.read` gives it.
        devices: by default all there are.

    Raises:
        InputError: if they do not.
    """
    mode = make_parallel(config, devices)
    task = make_task(config, mode.axis_name)
    source = EXAMPLES[task.family.kind]
    train, test = (
        source.open(config, name) for name in (config.data.train_split, config.data.eval_split)
    )
    for examples in (train, test):
        source.check(task, examples)
    if len(train) < config.batch_size:
        raise InputError(
            f"{train.name} has {len(train)} {source.noun}, and config.batch_size, "
            f"{config.batch_size}, must not be larger"
        )
    solver, schedule = make_optimizer(config, len(train) // config.batch_size)
    structure, like = blueprint(task, solver)
    return Run(config, mode, task, train, test, structure, solver, schedule, like)


def blueprint(task: Task, solver: optax.GradientTransformation) -> tuple[Structure, TrainState]:
    """The model but for its numbers, and shapes and dtypes of the state as checkpoints have it."""
    structure, params, other = split(nnx.eval_shape(task.make_model))
    like = jax.eval_shape(lambda p, o: new_state(p, o, solver, task.config.seed), params, other)
    return structure, like._replace(params=structure.params)
