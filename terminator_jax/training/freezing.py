"""Freezes parameters by their names: they are no part of what is trained.

A frozen parameter lies with the model's other variables, such as running averages. No gradient of
it is computed, the optimizer keeps no state for it, and neither an update nor a weight decay
changes it.
"""

import re
from typing import Any

from flax import nnx

from terminator_jax.errors import InputError


def trained_parameters(model: nnx.Module, pattern: str) -> Any:
    """Returns the filter, for `nnx.split`, of the parameters that are trained.

    Args:
        model: its parameters are named by their path, as in `blocks.0.slow_net.out_weight`.
        pattern: a regular expression, sought anywhere in the name; "" freezes none.

    Raises:
        InputError: if the pattern matches no parameter or all of them.

    Example:
        >>> model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)))
        >>> trained, frozen = nnx.state(model, trained_parameters(model, r"0\\.kernel"), ...)
        >>> list(frozen["layers"][0])
        ['kernel']
    """
    if not pattern:
        return nnx.Param

    def is_frozen(path: tuple, value: Any) -> bool:
        return re.search(pattern, ".".join(map(str, path))) is not None

    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    frozen = [is_frozen(path, value) for path, value in params]
    if not any(frozen):
        names = [".".join(map(str, path)) for path, _ in params]
        raise InputError(
            f"config.freeze is {pattern!r}, and matches no parameter: they are named as "
            f"{names[0]} and {names[-1]} are"
        )
    if all(frozen):
        raise InputError(
            f"config.freeze is {pattern!r}, and matches all {len(frozen)} parameters: nothing "
            "would be trained"
        )
    return nnx.All(nnx.Param, nnx.Not(is_frozen))
