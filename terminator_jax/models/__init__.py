"""Whole networks."""

from terminator_jax.models.lambda_resnet import LambdaResNet, LambdaResNetConfig
from terminator_jax.models.nonlinear_transformer import (
    NonLinearBlock,
    NonLinearTransformer,
    NonLinearTransformerConfig,
)
from terminator_jax.models.preprocessing import preprocess
from terminator_jax.models.registry import MODELS, ModelEntry, make_config
from terminator_jax.models.tabular import TabularConfig, TabularTerminator
from terminator_jax.models.terminator import Intermediates, Terminator, TerminatorConfig

__all__ = [
    "MODELS",
    "Intermediates",
    "LambdaResNet",
    "LambdaResNetConfig",
    "ModelEntry",
    "NonLinearBlock",
    "NonLinearTransformer",
    "NonLinearTransformerConfig",
    "TabularConfig",
    "TabularTerminator",
    "Terminator",
    "TerminatorConfig",
    "make_config",
    "preprocess",
]
