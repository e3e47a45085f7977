"""Optimizers as optax gradient transformations."""

from terminator_jax.optim.kar import (
    ScaleByKar2State,
    ScaleByKar3State,
    kar2,
    kar3,
    scale_by_kar2,
    scale_by_kar3,
)

__all__ = [
    "ScaleByKar2State",
    "ScaleByKar3State",
    "kar2",
    "kar3",
    "scale_by_kar2",
    "scale_by_kar3",
]
