"""Validates the fields of a configuration: their names, types and ranges."""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from terminator_jax.errors import InputError


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


_positive = (lambda value: value > 0, "greater than 0")
_not_negative = (lambda value: value >= 0, "0 or more")
_unit_interval = (lambda value: 0 <= value < 1, "in [0, 1)")

VALIDATORS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "epochs": _positive,
    "batch_size": _positive,
    "accumulate_steps": _positive,
    "ema_decay": _unit_interval,
    "eval_batch_size": _positive,
    "parallel": (lambda value: value in ("pmap", "jit"), "pmap or jit"),
    "dtype": (
        lambda value: value in ("float32", "bfloat16", "float64"),
        "float32, bfloat16 or float64",
    ),
    "freeze": (_is_pattern, "a regular expression"),
    "log_every_steps": _positive,
    "diagnostics_every_steps": _not_negative,
    "on_nonfinite": (lambda value: value in ("stop", "skip"), "stop or skip"),
    "checkpoint_every_steps": _not_negative,
    "keep_every_epochs": _not_negative,
    "early_stopping_epochs": _not_negative,
    "data.resize": _not_negative,
    "data.channels": (lambda value: value in (-1, 0, 1, 3, 4), "1, 3, 4, -1 or 0"),
    "data.match_classes": (lambda value: value in ("name", "number"), "name or number"),
    "data.eval_fraction": (lambda value: 0 < value < 1, "in (0, 1)"),
    "data.split_seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "data.std": (lambda value: all(x > 0 for x in value), "greater than 0"),
    "data.padding": _not_negative,
    "data.padding_mode": (lambda value: value in ("symmetric", "zeros"), "symmetric or zeros"),
    "data.rand_augment": _not_negative,
    "data.rand_augment_strength": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "data.mixup_alpha": _not_negative,
    "data.cutmix_alpha": _not_negative,
    "data.permutation": (
        lambda value: sorted(value) == list(range(len(value))),
        "empty or every number from 0 on once",
    ),
    "data.grid": (
        lambda value: len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value),
        "two numbers greater than 0",
    ),
    "data.hidden": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "data.hidden_seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "loss.label_smoothing": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "loss.slow_neural": _not_negative,
    "loss.l2": _not_negative,
    "optimizer.name": (
        lambda value: value in ("kar3", "kar2", "sgd", "adamw"),
        "kar3, kar2, sgd or adamw",
    ),
    "optimizer.learning_rate": _positive,
    "optimizer.warmup_epochs": _not_negative,
    "optimizer.beta1": _unit_interval,
    "optimizer.beta2": _unit_interval,
    "optimizer.momentum": _unit_interval,
    "optimizer.weight_decay": _not_negative,
    "optimizer.clip_norm": _not_negative,
}


def check(config: ConfigDict, defaults: ConfigDict) -> None:
    """Raises InputError if a field is unknown, missing, of the wrong type or out of range.

    Args:
        config: what is checked.
        defaults: has every field, with a value of its type.
    """
    known, given = dict(flatten(defaults)), dict(flatten(config))
    for path in given:
        if not path.startswith("model.options."):
            find(defaults, path)
    for path, default in known.items():
        if path not in given:
            raise InputError(f"config.{path} is missing: start from default_config()")
        _check_type(path, given[path], default)
        accepts, wanted = VALIDATORS.get(path, (lambda value: True, ""))
        if not accepts(given[path]):
            raise InputError(f"config.{path} is {short(given[path])}, and must be {wanted}")
    if config.optimizer.warmup_epochs >= config.epochs:
        raise InputError(
            f"config.optimizer.warmup_epochs is {config.optimizer.warmup_epochs}, and must be less "
            f"than config.epochs, {config.epochs}"
        )


def _check_type(path: str, value: Any, default: Any) -> None:
    wanted = float if isinstance(default, float) else type(default)
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise InputError(f"config.{path} must be of type {wanted.__name__}, not {value!r}")
    numbers = value if wanted is tuple else [value]
    if wanted is tuple and not all(isinstance(x, (int, float)) for x in numbers):
        raise InputError(f"config.{path} must be a tuple of numbers, not {value!r}")
    if not all(math.isfinite(x) for x in numbers if isinstance(x, float)):
        raise InputError(f"config.{path} is {short(value)}, and must be finite")


def find(config: ConfigDict, path: str) -> Any:
    """Returns the value of a field; raises InputError if there is none."""
    known = dict(flatten(config))
    if path in known or any(name.startswith(f"{path}.") for name in known):
        return known.get(path)
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    siblings = [name for name in known if name.rpartition(".")[0] == path.rpartition(".")[0]]
    hint = (
        f"did you mean config.{near[0]}?" if near else f"there are {', '.join(siblings or known)}"
    )
    raise InputError(f"there is no config.{path}: {hint}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of every field."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def short(value: Any) -> str:
    """Returns the value as Python writes it, with long tuples shortened."""
    return reprlib.repr(value) if isinstance(value, tuple) else repr(value)
