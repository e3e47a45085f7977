"""The initial values of a run from another model: `config.init_from`."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from flax import nnx

from terminator_jax import convert, loading
from terminator_jax.classes import listed, match
from terminator_jax.errors import InputError, one_line
from terminator_jax.training.setup import Run
from terminator_jax.training.state import new_state
from terminator_jax.training.tasks import Task


def initialize(run: Run) -> str:
    """Gives a run the variables of the model that `config.init_from` names.

    Classes are matched by their names: the parameters of the head are taken for those that the
    other model has too, in whatever order. They stay as they are if it lacks one. Variables that
    are no parameters, such as running averages, are taken where both models have them.

    Returns:
        A line that says what was taken.

    Raises:
        InputError: if there is no such model, or its parameters do not fit.
    """
    source = run.config.init_from
    variables, classes, config, origin = _read(Path(os.path.expanduser(source)))
    state = nnx.merge_state(run.named_parameters(), jax.device_get(run.state.model_state))
    there, here = (getattr(c, "num_classes", None) for c in (config, run.task.model_config))
    columns = _columns(run, classes, there, here)
    same = columns == list(range(there or 0))
    new = _transfer(variables, state, {} if same else _head(run.task), columns, source)
    params, model_state = nnx.split_state(state, run.model_def.trained, ...)
    fresh = new_state(jax.device_get(params), model_state, run.tx, run.config.seed)
    run.state = run.parallel.replicate(fresh)
    if new:
        names = ", ".join(new)
        others = f"{there} classes there, {here} here"
        if there == here:
            others = f"{listed(classes)} there, {listed(run.eval_data.classes)} here"
        return f"initial values from {origin}; a new head ({names}): {others}"
    return f"initial values from {origin}"


def _columns(
    run: Run, classes: Sequence[str], there: int | None, here: int | None
) -> list[int] | None:
    """Returns the numbers that the classes of a run have in another model.

    None if it lacks one, or has no names and another number of classes.
    """
    by_number = run.config.data.match_classes == "number" or not classes
    if by_number or here is None:
        return list(range(here or 0)) if there == here else None
    try:
        return match(run.eval_data.classes, classes).tolist()
    except ValueError:
        return None


def _head(task: Task) -> dict[tuple, int]:
    """Returns the paths of the parameters that depend on the number of classes, with their axes."""
    more = dataclasses.replace(task.model_config, num_classes=task.model_config.num_classes + 1)
    models = [t.make_model for t in (task, dataclasses.replace(task, model_config=more))]
    states = [nnx.to_flat_state(nnx.state(nnx.eval_shape(make))) for make in models]
    axes = {}
    for (path, one), (_, other) in zip(*states, strict=True):
        differ = [axis for axis in range(len(one.shape)) if one.shape[axis] != other.shape[axis]]
        if differ:
            axes[path] = differ[0]
    return axes


def _read(path: Path) -> tuple[nnx.State, tuple[str, ...], Any, str]:
    """Returns the variables of a model, its classes and configuration, and what to call it."""
    if not path.exists():
        raise InputError(
            f"config.init_from is {str(path)!r}, which does not exist: name a run's directory, its "
            "model.safetensors, or a file of the PyTorch release"
        )
    try:
        if path.is_dir() or _is_own_file(path):
            with warnings.catch_warnings():  # of missing running averages: training makes them
                warnings.simplefilter("ignore", UserWarning)
                loaded = loading.load_model(path)
            variables = nnx.state(loaded.model, nnx.Not(nnx.RngState))
            name = f"{path}, step {loaded.step}"
            return variables, loaded.classes, loaded.model_config, name
        model = convert.terminator_from_release(convert.read(path))
        return nnx.state(model, nnx.Param), (), model.config, f"the release's {path}"
    except ModuleNotFoundError as error:
        raise InputError(
            f"config.init_from: {path.suffix} files need {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # whatever a broken file makes its reader raise
        reason = one_line(error)
        raise InputError(f"config.init_from: {path} cannot be read: {reason}") from error


def _is_own_file(path: Path) -> bool:
    """Returns whether a file is one of this package, which has its configuration in it."""
    if path.suffix != ".safetensors":
        return False
    with safetensors.safe_open(path, "np") as content:
        return "config" in (content.metadata() or {})


def _transfer(
    source: nnx.State,
    target: nnx.State,
    head: Mapping[tuple, int],
    columns: Sequence[int] | None,
    name: str,
) -> list[str]:
    """Sets the target's variables; returns the names of those of a head that stays new.

    Args:
        source: the variables of the other model.
        target: those of this one.
        head: the axis of the classes in each parameter of the head that is not the same there.
        columns: the classes to take from there; None for a new head.
        name: what to call the other model.
    """
    given, wanted = dict(nnx.to_flat_state(source)), dict(nnx.to_flat_state(target))
    new, wrong = [], []
    for path in given.keys() | wanted.keys():
        there, here = given.get(path), wanted.get(path)
        dotted = ".".join(map(str, path))
        if there is None or here is None:
            where, only = ("here", here) if there is None else ("there", there)
            if isinstance(only, nnx.Param):
                wrong.append(f"{dotted} is only {where}")
            continue
        if path in head and columns is None:
            new.append(dotted)
            continue
        value = jax.device_get(there.get_value())
        if path in head and value.ndim == len(here.shape):
            value = np.take(value, columns, axis=head[path])
        if value.shape == here.shape:
            here.set_value(value.astype(here.dtype))
        else:
            wrong.append(f"{dotted} is {there.shape} there and {here.shape} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"config.init_from: {name} does not fit: {', '.join(sorted(wrong)[:3])}{more}: choose "
            "its config.model.name, variant and options"
        )
    return sorted(new)
