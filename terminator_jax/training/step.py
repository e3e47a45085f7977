"""One step of training and of evaluation: pure functions, the same for every way to run them."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from terminator_jax.ops.standardize import across
from terminator_jax.training.state import Structure, TrainState, pack, split
from terminator_jax.training.task import Metrics, Task


def make_train_step(
    task: Task, structure: Structure, solver: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Metrics], tuple[TrainState, Metrics]]:
    """A function `(state, batch) -> (state, metrics)` for `jax.jit` or `jax.pmap`.

    Under `pmap` it sees one device's rows of the batch. The model averages its batch statistics
    over `task.axis_name`, and so the average of the devices' gradients is that of the whole batch.
    """

    starts = structure.starts

    def train_step(state: TrainState, batch: Metrics) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss(params, vector):
            model = nnx.merge(structure.graph, params, state.other, copy=True)
            value, metrics = task.loss(model, batch, nnx.Rngs(dropout=key), (vector, starts))
            return value, (metrics, split(model)[2])

        # By name and packed then: through the unpacking, each would come out as a whole vector.
        differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
        params = structure.unpack(state.params)
        (grads, direct), (metrics, other) = differentiate(params, state.params)
        grads, metrics = across((pack(grads) + direct, metrics), task.axis_name)
        # optax multiplies counters with floats, which strict promotion of dtypes forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = solver.update(grads, state.opt_state, state.params)
            metrics["learning_rate"] = schedule(state.step)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, other, opt_state, state.key, state.step + 1), metrics

    return train_step


def make_eval_step(task: Task, structure: Structure) -> Callable[[TrainState, Metrics], Metrics]:
    """A function `(state, batch) -> sums over the batch` for `jax.jit` or `jax.pmap`."""

    def eval_step(state: TrainState, batch: Metrics) -> Metrics:
        model = structure.merge(state.params, state.other)
        model.eval()
        sums = task.score(model, batch)
        return sums if task.axis_name is None else jax.lax.psum(sums, task.axis_name)

    return eval_step
