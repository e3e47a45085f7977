"""Whole networks."""

from terminator_jax.models.tabular import TabularConfig, TabularTerminator
from terminator_jax.models.terminator import Intermediates, Terminator, TerminatorConfig

__all__ = [
    "Intermediates",
    "TabularConfig",
    "TabularTerminator",
    "Terminator",
    "TerminatorConfig",
]
