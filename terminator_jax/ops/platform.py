"""Choices that depend on the platform, made when a program is lowered for it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
_only: contextvars.ContextVar[str] = contextvars.ContextVar("only", default="")


@contextlib.contextmanager
def only(platform: str) -> Iterator[None]:
    """Traces programs for one platform within a `with` block.

    Faster to trace, and jax2onnx cannot convert `platform_dependent`. Functions traced before the
    `with` block are not retraced.

    Args:
      platform: as `jax.Device.platform`; others than `"gpu"` and `"tpu"` are taken for `"cpu"`.

    Example:
      >>> with only("tpu"):
      ...     by_platform(lambda platform: platform, lambda choice: lambda: choice)
      'tpu'
    """
    token = _only.set(platform if platform in PLATFORMS else "cpu")
    try:
        yield
    finally:
        _only.reset(token)


def by_platform(
    choose: Callable[[str], Any], function: Callable[[Any], Callable[..., Any]], *arrays: Any
) -> Any:
    """Calls what is chosen for the platform that the program will run on.

    The platform is known when a program is lowered and not while it is traced, so a program for
    several platforms holds what is chosen for each.

    Args:
      choose: from `"cpu"`, `"gpu"` or `"tpu"` to a choice that can be hashed.
      function: from a choice to a function of `arrays`.
      arrays: pytrees of arrays.

    Example:
      >>> times = lambda factor: lambda x: factor * x
      >>> print(by_platform(lambda platform: 2, times, jax.numpy.arange(3)))
      [0 2 4]
    """
    if platform := _only.get():
        return function(choose(platform))(*arrays)
    functions = {choice: function(choice) for choice in map(choose, PLATFORMS)}
    cpu, gpu, tpu = (functions[choose(platform)] for platform in PLATFORMS)
    if len(functions) == 1:
        return cpu(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=tpu, cuda=gpu, rocm=gpu, default=cpu)
