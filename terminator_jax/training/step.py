"""One step of training and of evaluation: pure functions, the same for every way to run them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from terminator_jax.layers.running import use_batch_statistics
from terminator_jax.ops.standardize import across
from terminator_jax.training.metrics import Metrics
from terminator_jax.training.state import ModelDef, TrainState, ravel, split_model
from terminator_jax.training.tasks import DeviceBatch, ImageClassification, Task

# Folded into a step's key for the streams of the model itself. `rngs.dropout()` folds its count
# into the key, from 0, and never comes as far.
STREAMS = 2**31

Gradients = Callable[[TrainState, DeviceBatch], tuple[jax.Array, Metrics, nnx.State]]


def make_gradients(task: Task, model_def: ModelDef) -> Gradients:
    """Returns a function `(state, batch) -> (gradient, metrics, model_state)`.

    The gradient is one vector, as the parameters are. Under `pmap` the function sees one device's
    rows of the batch. The model averages its batch statistics over `task.axis_name`, so the average
    of the devices' gradients is that of the whole batch.

    Args:
        task: the loss.
        model_def: the model without its variables.
    """

    def gradients(state: TrainState, batch: DeviceBatch) -> tuple[jax.Array, Metrics, nnx.State]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_fn(params: nnx.State):
            # One key is for layers that hold a stream, such as nnx.Dropout; `rngs` is for models
            # that take it as an argument.
            stream_key = _stream_key(key, task.axis_name)
            model = model_def.merge(params, state.model_state, stream_key)
            loss, metrics = task.loss(model, batch, nnx.Rngs(dropout=key))
            _, _, model_state = split_model(model, model_def.trained)
            return loss, (metrics, model_state)

        params = model_def.unravel(state.params)
        grads, (metrics, model_state) = jax.grad(loss_fn, has_aux=True)(params)
        grads, metrics = across((ravel(grads), metrics), task.axis_name)
        return grads, metrics, model_state

    return gradients


def make_train_step(
    task: Task, model_def: ModelDef, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Returns a function `(state, batch) -> (state, metrics)` for `jax.jit` or `jax.pmap`.

    A step whose loss or gradient is not finite changes nothing but the number of steps. Its metric
    `skipped` is 1.

    Args:
        task: the loss.
        model_def: the model without its variables.
        tx: the optimizer.
        schedule: the learning rate at each update, to be logged.
    """
    gradients = make_gradients(task, model_def)

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        grads, metrics, model_state = gradients(state, batch)
        metrics["gradient_norm"] = jnp.linalg.norm(grads)
        # optax multiplies counters with floats, which strict promotion of dtypes forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            metrics["learning_rate"] = schedule(_updates(state))
        params = optax.apply_updates(state.params, updates)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["skipped"] = jnp.where(finite, 0, 1)
        changed = TrainState(params, model_state, opt_state, state.key, state.step)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        return state._replace(step=state.step + 1), metrics

    return train_step


def _updates(state: TrainState) -> jax.Array:
    """Returns the number of updates, of which skipped and accumulated steps make none."""
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def _stream_key(key: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the key of the streams that the model itself holds: on each device another.

    A layer such as `nnx.Dropout` draws for the rows that it sees. With one key for all devices of a
    `pmap`, each would drop the same.
    """
    key = jax.random.fold_in(key, STREAMS)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def make_eval_step(
    task: Task, model_def: ModelDef, statistics: str = "running"
) -> Callable[[TrainState, DeviceBatch], Metrics]:
    """Returns a function `(state, batch) -> sums over the batch` for `jax.jit` or `jax.pmap`.

    Args:
        task: the metrics.
        model_def: the model without its variables.
        statistics: `"running"` averages of training, or those of the `"batch"`.
    """

    def eval_step(state: TrainState, batch: DeviceBatch) -> Metrics:
        model = _evaluated(state, model_def, statistics)
        sums = task.eval_step(model, batch)
        return sums if task.axis_name is None else jax.lax.psum(sums, task.axis_name)

    return eval_step


def make_logits_step(
    task: ImageClassification, model_def: ModelDef, statistics: str = "running"
) -> Callable[[TrainState, DeviceBatch], jax.Array]:
    """Returns a function `(state, batch) -> logits of the whole batch`; see `make_eval_step`."""

    def logits_step(state: TrainState, batch: DeviceBatch) -> jax.Array:
        logits = task.logits(_evaluated(state, model_def, statistics), batch)
        axis = task.axis_name
        return logits if axis is None else jax.lax.all_gather(logits, axis, tiled=True)

    return logits_step


def _evaluated(state: TrainState, model_def: ModelDef, statistics: str) -> nnx.Module:
    """Returns the model in evaluation mode."""
    model = model_def.merge(model_def.unravel(state.params), state.model_state)
    model.eval()
    if statistics == "batch":
        use_batch_statistics(model)
    return model
