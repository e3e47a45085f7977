"""Whole networks."""

from terminator_jax.models.nonlinear_transformer import (
    NonLinearBlock,
    NonLinearTransformer,
    NonLinearTransformerConfig,
)
from terminator_jax.models.terminator import Intermediates, Terminator, TerminatorConfig

__all__ = [
    "Intermediates",
    "NonLinearBlock",
    "NonLinearTransformer",
    "NonLinearTransformerConfig",
    "Terminator",
    "TerminatorConfig",
]
