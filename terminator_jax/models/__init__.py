"""Whole networks."""

from terminator_jax.models.terminator import Intermediates, Terminator, TerminatorConfig

__all__ = ["Intermediates", "Terminator", "TerminatorConfig"]
