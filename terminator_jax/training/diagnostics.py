"""Looks into a training: norms by part of the network, features by block, slow networks by pair.

    config.diagnostics_every_steps=100     logs them, under the kind "diagnostics"
    workdir/nonfinite-STEP.json            what is known of a step that was not finite

Both run one more forward and backward pass, in a program of their own: in 100 steps, 1 % more time.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.training.metrics import Metrics, Scalars
from terminator_jax.training.paths import replace_text
from terminator_jax.training.setup import Run
from terminator_jax.training.state import ModelDef, TrainState
from terminator_jax.training.step import make_gradients
from terminator_jax.training.tasks import DeviceBatch

# The parts of a network, by the names of their parameters; the first that fits counts.
PARTS = {"slow": r"(^|\.)slow_nets?\.|_interaction\.", "head": r"^head\.", "fast": ""}


def norms_by_part(vector: jax.Array, model_def: ModelDef) -> Metrics:
    """Returns the norm of each part of a vector that is laid out as the parameters are.

    Args:
        vector: the parameters, their gradient or their update, see `state.ravel`.
        model_def: has the names and shapes of the parameters.

    Example:
        >>> from flax import nnx
        >>> from terminator_jax.training.state import ravel, split_model
        >>> model_def, params, _ = split_model(nnx.Dict(head=nnx.Linear(1, 2, rngs=nnx.Rngs(0))))
        >>> {name: float(norm) for name, norm in norms_by_part(jnp.ones(4), model_def).items()}
        {'head': 2.0}
    """
    leaves, _ = jax.tree.flatten_with_path(model_def.params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    sizes = np.array([leaf.size for _, leaf in leaves])
    parts = [next(part for part, find in PARTS.items() if re.search(find, name)) for name in names]
    # Three kernels, whatever the number of parameters.
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=int(sizes.sum()))
    squares = jax.ops.segment_sum(jnp.square(vector), owner, len(sizes), indices_are_sorted=True)
    return {
        part: jnp.sqrt(jnp.sum(squares[np.array([name == part for name in parts])]))
        for part in dict.fromkeys(parts)
    }


def make_diagnose(run: Run) -> Callable[[DeviceBatch], Scalars]:
    """Returns a function that looks into the run's state, as it is, at a training batch.

    It gives `gradient_norm/PART`, `update_norm/PART` and what `task.diagnostics` gives.
    """

    def diagnose(state: TrainState, batch: DeviceBatch) -> Metrics:
        grads, _, _ = make_gradients(run.task, run.model_def)(state, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = run.tx.update(grads, state.opt_state, state.params)
        found = {
            f"{name}/{part}": norm
            for name, vector in (("gradient_norm", grads), ("update_norm", updates))
            for part, norm in norms_by_part(vector, run.model_def).items()
        }
        model = run.model_def.merge(run.model_def.unravel(state.params), state.model_state)
        return found | run.task.diagnostics(model, batch)

    compiled = run.parallel.compile(diagnose)

    def look(batch: DeviceBatch) -> Scalars:
        found = jax.device_get(compiled(run.state, run.parallel.shard_batch(batch)))
        return {name: float(value) for name, value in found.items()}

    return look


def write_report(run: Run, workdir: Path, step: int, metrics: Scalars) -> Path:
    """Writes what is known of a step that was not finite; all processes must call this.

    The step has changed nothing. The norms are those of its batch and of the run's state now, which
    later steps may have changed.

    Args:
        run: the run.
        workdir: the directory of the run.
        step: its number, from 1.
        metrics: what it gave.
    """
    found = make_diagnose(run)(run.train_batch(step - 1))
    report = {
        "step": step,
        "examples": [int(n) for n in run.train_indices(step - 1)],
        **{name: _valid(float(value)) for name, value in metrics.items()},
        **{name: _valid(value) for name, value in found.items()},
    }
    file = workdir / f"nonfinite-{step}.json"
    if jax.process_index() == 0:
        replace_text(file, json.dumps(report, indent=1) + "\n")
    return file


def _valid(value: float) -> float | str:
    """Returns a value that JSON has: it has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
