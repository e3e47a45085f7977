"""Whole networks."""

from terminator_jax.models.lambda_resnet import LambdaResNet, LambdaResNetConfig
from terminator_jax.models.nonlinear_transformer import (
    NonLinearBlock,
    NonLinearTransformer,
    NonLinearTransformerConfig,
)
from terminator_jax.models.tabular import TabularConfig, TabularTerminator
from terminator_jax.models.terminator import Intermediates, Terminator, TerminatorConfig

__all__ = [
    "Intermediates",
    "LambdaResNet",
    "LambdaResNetConfig",
    "NonLinearBlock",
    "NonLinearTransformer",
    "NonLinearTransformerConfig",
    "TabularConfig",
    "TabularTerminator",
    "Terminator",
    "TerminatorConfig",
]
