"""Finds a model's class and its variants by name, as configurations name them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from terminator_jax.layers.local import LocalBranch
from terminator_jax.models.lambda_resnet import LambdaResNet, LambdaResNetConfig
from terminator_jax.models.nonlinear_transformer import (
    NonLinearTransformer,
    NonLinearTransformerConfig,
)
from terminator_jax.models.terminator import Terminator, TerminatorConfig


class ModelEntry(NamedTuple):
    """A kind of model.

    Attributes:
      module: makes the model from its configuration and `dtype`, `param_dtype`, `axis_name`,
        `remat` and `rngs`.
      variants: makers of its configuration by name; keywords replace fields. That of a model for
        pictures has the fields `size`, `channels` and `num_classes`, that of one for text
        `vocabulary` and `mask_token`.
      convert: of an option as a tuple of plain values to what the configuration takes.
    """

    module: Callable[..., nnx.Module]
    variants: Mapping[str, Callable[..., Any]]
    convert: Mapping[str, Callable[[Any], Any]] = {}


def _variants(config: type, *names: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(config, name) for name in names}


def _branches(rows: tuple[tuple[int, str, str], ...]) -> tuple[LocalBranch, ...]:
    return tuple(LocalBranch(*row) for row in rows)


MODELS = {
    "terminator": ModelEntry(
        Terminator,
        _variants(TerminatorConfig, "cifar", "mnist", "digits", "scifar", "smnist", "sdigits"),
        {"branches": _branches},
    ),
    "lambda_resnet": ModelEntry(
        LambdaResNet,
        _variants(
            LambdaResNetConfig,
            *("lambda26", "lambda50", "cifar", "mnist", "digits"),
            *("plain_cifar", "plain_mnist", "plain_digits"),
        ),
    ),
    "nonlinear_transformer": ModelEntry(
        NonLinearTransformer, _variants(NonLinearTransformerConfig, "shakespeare", "tiny")
    ),
}


def make_config(name: str, variant: str, options: Mapping[str, Any]) -> Any:
    """Makes a model's configuration from names and plain values.

    Args:
      name: of `MODELS`.
      variant: of that model's variants.
      options: fields of the variant to replace.

    Raises:
      ValueError: if there is no such model or variant, or an option is unknown or does not fit.

    Example:
      >>> make_config("terminator", "digits", {"num_classes": 5}).num_classes
      5
    """
    entry = _choose("config.model.name", name, MODELS)
    make = _choose("config.model.variant", variant, entry.variants)
    try:
        return make(**{k: entry.convert.get(k, lambda x: x)(v) for k, v in options.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.model.options: {error}") from error


def _choose(field: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{field} is {name!r}, and must be one of {', '.join(table)}")
    return table[name]
