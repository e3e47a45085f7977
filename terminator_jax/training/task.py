"""What is trained: a model, its loss and what is counted, each found in a table by name.

A new kind of model is one more line in `models.MODELS` and one in `FAMILIES`. What it is trained
for is one of `KINDS`: classes of pictures, or hidden tokens of texts.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax import losses
from terminator_jax.data.errors import InputError
from terminator_jax.models import MODELS, Terminator, make_config, preprocess
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.training import masked_tokens

Metrics = dict[str, jax.Array]
# Parameters in one vector, and where in it each begins.
Packed = tuple[jax.Array, Sequence[int]]


class Family(NamedTuple):
    """How a kind of model is trained; the model itself is an entry of `models.MODELS`.

    Attributes:
        loss: of a model for pictures: `(model, pictures, labels, rngs, config.loss)` to logits and
            the terms of the loss, which are added up.
        kind: what it is trained for, of `KINDS` and `examples.EXAMPLES`.
        penalties: `(model, config.loss, packed)` to further terms of the loss; see
            `Task.loss`.
    """

    loss: Callable[..., tuple[jax.Array, Metrics]] | None
    kind: str = "pictures"
    penalties: Callable[..., Metrics] = lambda model, config, packed: {}


class Kind(NamedTuple):
    """What a model is trained for.

    Attributes:
        loss: `(task, model, batch, rngs)` to the loss of a training batch and what is logged of it,
            `loss` and `accuracy` among it: means over the batch.
        score: `(task, model, batch)` to sums over an evaluation batch without its padding: `count`,
            and of so many `loss` and `accuracy`.
    """

    loss: Callable[..., tuple[jax.Array, Metrics]]
    score: Callable[..., Metrics]


def terminator_loss(
    model: Terminator, pictures: jax.Array, labels: jax.Array, rngs: nnx.Rngs, config: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Label smoothing and slow neural loss."""
    logits, inter = model(pictures, rngs=rngs, intermediates=True)
    slow = losses.slow_neural(inter.hyper_kernels, model.config.factors, config.channel_sum)
    terms = {
        "label_smoothing": losses.label_smoothing(logits, labels, config.label_smoothing),
        "slow_neural": config.slow_neural * slow,
    }
    return logits, terms


def terminator_penalties(model: Terminator, config: ConfigDict, packed: Packed | None) -> Metrics:
    """L2 norms."""
    return {"l2": losses.l2(nnx.state(model, nnx.Param), scale=config.l2, packed=packed)}


def smoothed_loss(
    model: nnx.Module, pictures: jax.Array, labels: jax.Array, rngs: nnx.Rngs, config: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Label smoothing alone."""
    del rngs  # nothing is dropped
    logits = model(pictures)
    smoothed = losses.label_smoothing(logits, labels, config.label_smoothing)
    return logits, {"label_smoothing": smoothed}


FAMILIES = {
    "terminator": Family(terminator_loss, penalties=terminator_penalties),
    "lambda_resnet": Family(smoothed_loss),
    "nonlinear_transformer": Family(None, kind="text"),
}


class Keys:
    """The keys that `nnx.Rngs(seed).params()` gives, one after the other.

    `nnx.Rngs` counts them in an array. Where only shapes are wanted, in `nnx.eval_shape`, a key
    then takes 8 ms.
    """

    def __init__(self, seed: int):
        self._key, self._count = jax.random.key(seed), 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to be made and what it is trained for; see `make_task`.

    Attributes:
        family: the kind of model.
        model_config: the shape of the model.
        config: the configuration of the run.
        axis_name: the mapped axis over which the batch is split, if any.
    """

    family: Family
    model_config: Any
    config: ConfigDict
    axis_name: str | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the computation."""
        return jnp.dtype(self.config.dtype)

    def make_model(self) -> nnx.Module:
        """A new model; the seed decides its initial values.

        Raises:
            InputError: if the model's options do not fit each other.
        """
        try:
            return MODELS[self.config.model.name].module(
                self.model_config,
                dtype=self.dtype,
                param_dtype=at_least_float32(self.dtype),
                axis_name=self.axis_name,
                remat=self.config.remat,
                rngs=Keys(self.config.seed),
            )
        except ValueError as error:
            raise InputError(f"config.model.options: {error}") from error

    def inputs(self, pictures: jax.Array) -> jax.Array:
        """What the model sees of uint8 or uint16 pictures `(batch, height, width, channels)`.

        The largest value of their dtype counts as 1. The data set's mean and standard deviation are
        made 0 and 1, and pictures may become sequences of their pixels,
        `(batch, height * width, channels)`.
        """
        data = self.config.data
        return preprocess(
            pictures, mean=data.mean, std=data.std, sequence=data.sequence,
            permutation=data.permutation, dtype=at_least_float32(self.dtype),
        )  # fmt: skip

    def loss(
        self,
        model: nnx.Module,
        batch: Metrics,
        rngs: nnx.Rngs,
        packed: Packed | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a training batch, and what is logged of it: means over the batch.

        With `packed`, all parameters in one vector too, penalties are of that: the gradient of the
        loss is then the sum of those by the model's parameters and by the vector.
        """
        loss, metrics = KINDS[self.family.kind].loss(self, model, batch, rngs)
        terms = self.family.penalties(model, self.config.loss, packed)
        loss = sum(terms.values(), loss)
        return loss, metrics | {"loss": loss} | terms

    def score(self, model: nnx.Module, batch: Metrics) -> Metrics:
        """Sums over an evaluation batch, without its padding: count, cross-entropy, hits."""
        return KINDS[self.family.kind].score(self, model, batch)


def classification_loss(
    task: Task, model: nnx.Module, batch: Metrics, rngs: nnx.Rngs
) -> tuple[jax.Array, Metrics]:
    """The family's loss of pictures and labels, with its terms and the accuracy."""
    x, labels = task.inputs(batch["image"]), batch["label"]
    logits, terms = task.family.loss(model, x, labels, rngs, task.config.loss)
    loss = sum(terms.values())
    return loss, {"loss": loss, "accuracy": jnp.mean(_hits(logits, labels)), **terms}


def classification_score(task: Task, model: nnx.Module, batch: Metrics) -> Metrics:
    """Pictures, cross-entropy and hits."""
    logits = model(task.inputs(batch["image"]))
    entropy = jax.vmap(lambda row, label: losses.label_smoothing(row, label, epsilon=0.0))
    values = {
        "count": jnp.ones_like(batch["mask"], jnp.int32),
        "loss": entropy(logits, batch["label"]),
        "accuracy": _hits(logits, batch["label"]),
    }
    return {name: jnp.sum(jnp.where(batch["mask"], x, 0)) for name, x in values.items()}


KINDS = {
    "pictures": Kind(classification_loss, classification_score),
    "text": Kind(masked_tokens.loss, masked_tokens.score),
}


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1.0 where the largest logit is that of the label, else 0.0."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def make_task(config: ConfigDict, axis_name: str | None = None) -> Task:
    """The task of a configuration; makes no model yet.

    Args:
        config: as `config.read` gives it.
        axis_name: the mapped axis over which the batch is split, if any.

    Raises:
        InputError: if there is no such model or variant, an option does not fit, or float64 is
            asked for and off.
    """
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise InputError("config.dtype is 'float64', which needs JAX_ENABLE_X64=1")
    model = config.model
    try:
        model_config = make_config(model.name, model.variant, model.options.to_dict())
    except ValueError as error:
        raise InputError(str(error)) from error
    return Task(FAMILIES[model.name], model_config, config, axis_name)


def check_data(task: Task, shape: tuple[int, ...], num_classes: int, name: str) -> None:
    """Raises InputError if pictures of `shape` (height, width, channels) do not fit the model."""
    model, data = task.model_config, task.config.data
    size = (math.prod(shape[:-1]),) if data.sequence else tuple(shape[:-1])
    if data.permutation and (len(data.permutation),) != size:
        raise InputError(
            f"config.data.permutation has {len(data.permutation)} positions, and {name} has "
            f"{'sequences' if data.sequence else 'pictures'} of {size}: it orders a sequence, "
            "config.data.sequence=True"
        )
    for what, has, takes in (
        (f"{'sequences' if data.sequence else 'pictures'} of {{}} pixels", size, tuple(model.size)),
        ("pictures of {} channels", shape[-1], model.channels),
        ("{} classes", num_classes, model.num_classes),
    ):
        if has != takes:
            raise InputError(
                f"{name} has {what.format(has)}, and the model is for {takes}: choose another "
                "config.model.variant, or set config.model.options or config.data.resize"
            )
    for field in ("mean", "std"):
        if len(data[field]) not in (1, shape[-1]):
            raise InputError(
                f"config.data.{field} has {len(data[field])} values, and {name} has "
                f"{shape[-1]} channels"
            )
