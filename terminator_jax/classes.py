"""Matches the classes of data with those of a model, by their names."""

from collections.abc import Sequence

import numpy as np

SHOWN = 10


def match(given: Sequence[str], wanted: Sequence[str], *, by: str = "name") -> np.ndarray:
    """Returns, for each given class, its number among the wanted ones.

    Args:
        given: the names of the classes of data, in the order of its labels.
        wanted: those of a model, in the order of its logits.
        by: `"name"`, or `"number"` where the names do not say which are the same. Classes without
            names, of which one of the sequences is empty, are matched by number too.

    Raises:
        ValueError: if there are others among them, or more.

    Example:
        >>> match(["dog", "cat"], ["ape", "cat", "dog"])
        array([2, 1])
    """
    if by == "number" or not given or not wanted:
        if wanted and len(given) > len(wanted):
            raise ValueError(f"{len(given)} classes are more than the model's {len(wanted)}")
        return np.arange(len(given) or len(wanted))
    numbers = {name: number for number, name in enumerate(wanted)}
    others = [name for name in given if name not in numbers]
    if others:
        raise ValueError(
            f"the classes are {listed(given)}, and the model's are {listed(wanted)}, without "
            f"{listed(others)}"
        )
    return np.array([numbers[name] for name in given])


def listed(names: Sequence[str]) -> str:
    """Returns names for a message, the first ones of many.

    Example:
        >>> listed(["cat", "dog"])
        'cat, dog'
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
