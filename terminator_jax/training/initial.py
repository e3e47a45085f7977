"""The initial values of a run from another model: `config.init_from`."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import safetensors
from flax import nnx

from terminator_jax import convert, loading
from terminator_jax.errors import InputError, one_line
from terminator_jax.training.setup import Run
from terminator_jax.training.state import new_state


def initialize(run: Run) -> str:
    """Gives a run the variables of the model that `config.init_from` names.

    The parameters that depend on the number of classes stay as they are where that differs.
    Variables that are no parameters, such as running averages, are taken where both models have
    them.

    Returns:
        A line that says what was taken.

    Raises:
        InputError: if there is no such model, or its parameters do not fit.
    """
    source = run.config.init_from
    variables, config, origin = _read(Path(os.path.expanduser(source)))
    counts = tuple(getattr(c, "num_classes", None) for c in (config, run.task.model_config))
    state = nnx.merge_state(run.named_parameters(), jax.device_get(run.state.model_state))
    new = _transfer(variables, state, counts, source)
    params, model_state = nnx.split_state(state, run.model_def.trained, ...)
    fresh = new_state(jax.device_get(params), model_state, run.tx, run.config.seed)
    run.state = run.parallel.replicate(fresh)
    there, here = counts
    head = f"; a new head ({', '.join(new)}): {there} classes there, {here} here" if new else ""
    return f"initial values from {origin}{head}"


def _read(path: Path) -> tuple[nnx.State, Any, str]:
    """Returns the variables of a model, its configuration, and what to call it."""
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
            return variables, loaded.model_config, f"{path}, step {loaded.step}"
        model = convert.terminator_from_release(convert.read(path))
        return nnx.state(model, nnx.Param), model.config, f"the release's {path}"
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
    source: nnx.State, target: nnx.State, counts: tuple[int | None, int | None], name: str
) -> list[str]:
    """Sets the target's variables; returns the names of those of a head that stays new."""
    given, wanted = dict(nnx.to_flat_state(source)), dict(nnx.to_flat_state(target))
    new, wrong = [], []
    for path in given.keys() | wanted.keys():
        there, here = given.get(path), wanted.get(path)
        dotted = ".".join(map(str, path))
        if there is None or here is None:
            where, only = ("here", here) if there is None else ("there", there)
            if isinstance(only, nnx.Param):
                wrong.append(f"{dotted} is only {where}")
        elif there.shape == here.shape:
            here.set_value(jax.device_get(there.get_value()).astype(here.dtype))
        elif _is_head(there.shape, here.shape, counts):
            new.append(dotted)
        else:
            wrong.append(f"{dotted} is {there.shape} there and {here.shape} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"config.init_from: {name} does not fit: {', '.join(sorted(wrong)[:3])}{more}: choose "
            "its config.model.name, variant and options"
        )
    return sorted(new)


def _is_head(
    there: tuple[int, ...], here: tuple[int, ...], counts: tuple[int | None, int | None]
) -> bool:
    """Returns whether two shapes differ by nothing but the number of classes."""
    return there[:-1] == here[:-1] and (there[-1:], here[-1:]) == tuple((n,) for n in counts)
