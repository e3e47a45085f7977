"""Checks the fields of a model's configuration when it is made, before any module is."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What a field's value must fulfil, as a function and in words."""

    accepts: Callable[[Any], bool]
    words: str


POSITIVE = Rule(lambda value: value > 0, "greater than 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "0 or more")
ALL_POSITIVE = Rule(lambda values: values and min(values) > 0, "one or more numbers greater than 0")
DROPOUT = Rule(lambda value: 0 <= value < 1, "in [0, 1)")
# Arrays of larger sizes would fill the machine's memory before it says that they cannot be had.
LARGEST = 2**24
DROPOUTS = Rule(lambda values: all(map(DROPOUT.accepts, values)), "numbers in [0, 1)")


def check_fields(config: Any, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError if a field of a dataclass is of another type, huge, or breaks its rule.

    Args:
      config: an instance of a dataclass with type hints.
      rules: rules by the names of fields.

    Example:
      >>> @dataclasses.dataclass
      ... class Config:
      ...     size: tuple[int, ...]
      >>> check_fields(Config((8, 0)), {"size": ALL_POSITIVE})
      Traceback (most recent call last):
      ...
      ValueError: size is (8, 0), and must be one or more numbers greater than 0
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if not _is_of(value, hints[name]):
            raise ValueError(f"{name} is {value!r}, and must be of type {_words(hints[name])}")
        values = value if isinstance(value, tuple) else (value,)
        if any(_is_number(entry, numbers.Integral) and entry > LARGEST for entry in values):
            raise ValueError(f"{name} is {value!r}, and must be {LARGEST:,} or less")
        if name in rules and value is not None and not rules[name].accepts(value):
            raise ValueError(f"{name} is {value!r}, and must be {rules[name].words}")


def _is_of(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type; an integer is a float too, and a bool is neither."""
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_of(entry, item) for entry in value)
    if get_args(hint):  # a union
        return any(_is_of(value, option) for option in get_args(hint))
    if hint is float:
        return _is_number(value, numbers.Real) and math.isfinite(value)
    return _is_number(value, numbers.Integral) if hint is int else isinstance(value, hint)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
