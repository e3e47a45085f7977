"""The tasks: what a model is trained for, each as one class.

A task opens its data, makes its model, and computes the loss and the evaluation of a batch. A new
one is a class and a line in `TASKS`; a new metric is a function and a line in `METRICS`, and in
`history.LOWER_IS_BETTER` if the smallest value is the best.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax import losses
from terminator_jax.data import augment, ngrams, sources, text
from terminator_jax.data.augment import Process
from terminator_jax.data.pictures import Pictures, Stored
from terminator_jax.data.randaugment import RandAugment
from terminator_jax.errors import InputError
from terminator_jax.models import MODELS, make_config, preprocess
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.standardize import across
from terminator_jax.training.averages import PREFIX

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each label, `(...)`, of logits `(..., classes)`."""
    logits = logits.astype(at_least_float32(logits.dtype))
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1 where the largest logit is that of the label, else 0; shapes as `cross_entropy`."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


# What an evaluation averages, of logits `(..., classes)` and labels `(...)` to values `(...)`.
METRICS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "accuracy": is_correct,
    "loss": cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What all tasks share.

    Attributes:
        config: the configuration of the run.
        model_config: the configuration of the model.
        axis_name: the mapped axis over which the batch is split, if any.
        unit: what an example is called.
        unit_of_speed: what the log counts by the second.
        unit_of_evaluation: what an evaluation counts.
        default_best_metric: the metric that decides which checkpoint is the best one.
    """

    config: ConfigDict
    model_config: Any
    axis_name: str | None = None

    unit: ClassVar[str]
    unit_of_speed: ClassVar[str]
    unit_of_evaluation: ClassVar[str]
    default_best_metric: ClassVar[str]

    def open(self, split: str) -> Any:
        """Opens a split of the data set.

        Returns:
            Examples with `len`, `name`, `shape`, `classes`, `read(indices)` and `load()`.

        Raises:
            InputError: if there is no such split, or it does not fit the model.
        """
        raise NotImplementedError

    def augmentations(
        self, examples: Any, process: Process
    ) -> Sequence[grain.transforms.RandomMap]:
        """Returns the augmentations of training batches, in their order; none by default."""
        del examples, process
        return ()

    def loss(
        self, model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss of a training batch.

        Returns:
            The loss, and what is logged: `loss` and other means over the batch.
        """
        raise NotImplementedError

    def eval_step(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Computes the sums of `metrics` over an evaluation batch without its padding.

        Returns:
            `count` and a sum for each metric.
        """
        raise NotImplementedError

    def diagnostics(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Computes what shows how the inside of a model in training mode does, by name."""
        del model, batch
        return {}

    def baselines(self, train: Any, evaluation: Any) -> dict[str, float]:
        """Computes losses that need no model, by name, of the same evaluation."""
        del train, evaluation
        return {}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what `eval_step` sums, besides `count`, in the order of printing."""
        return tuple(METRICS)

    @property
    def best_metric(self) -> str:
        """The metric of an evaluation that decides which checkpoint is the best one.

        With a moving average of the parameters it is by default the average's.
        """
        prefix = PREFIX if self.config.ema_decay else ""
        return self.config.best_metric or prefix + self.default_best_metric

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the computation."""
        return jnp.dtype(self.config.dtype)

    def make_model(self) -> nnx.Module:
        """Makes the model; the seed decides its initial values.

        Raises:
            InputError: if the model's options do not fit each other.
        """
        seed = self.config.seed
        try:
            return MODELS[self.config.model.name].module(
                self.model_config,
                dtype=self.dtype,
                param_dtype=at_least_float32(self.dtype),
                axis_name=self.axis_name,
                remat=self.config.remat,
                rngs=nnx.Rngs(params=seed, dropout=seed),
            )
        except ValueError as error:
            raise InputError(f"config.model.options: {error}") from error


class ImageClassification(Task):
    """Classifies images by the cross-entropy with smoothed labels."""

    unit = "pictures"
    unit_of_speed = "images"
    unit_of_evaluation = "pictures"
    default_best_metric = "accuracy"

    def open(self, split: str) -> Stored | Pictures:
        """Opens a split of images with labels, and checks that the model is made for them."""
        data = self.config.data
        images = sources.open_split(
            data.name,
            split,
            data_dir=data.data_dir,
            download=data.download,
            resize=data.resize,
            eval_fraction=data.eval_fraction,
            split_seed=data.split_seed,
        )
        self.validate_images(images.shape, images.num_classes, images.name)
        return images

    def validate_images(self, shape: tuple[int, ...], num_classes: int, name: str) -> None:
        """Raises InputError if images of `shape` (height, width, channels) do not fit the model."""
        model, data = self.model_config, self.config.data
        kind = "sequences" if data.sequence else "pictures"
        size = (math.prod(shape[:-1]),) if data.sequence else tuple(shape[:-1])
        if data.permutation and (len(data.permutation),) != size:
            raise InputError(
                f"config.data.permutation has {len(data.permutation)} positions, and {name} has "
                f"{kind} of {size}: it orders a sequence, config.data.sequence=True"
            )
        for what, has, takes in (
            (f"{kind} of {{}} pixels", size, tuple(model.size)),
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

    def augmentations(self, examples: Any, process: Process) -> list[grain.transforms.RandomMap]:
        """Returns the augmentations that the configuration asks for.

        Raises:
            InputError: if one of them cannot be applied to these pictures or batches.
        """
        found, data = [], self.config.data
        if data.padding:
            found.append(augment.RandomCrop(data.padding, data.padding_mode, process))
        if data.flip:
            found.append(augment.RandomFlip(process))
        if data.rand_augment:
            if examples.dtype != np.uint8 or examples.shape[-1] not in (1, 3):
                raise InputError(
                    f"config.data.rand_augment is for pictures of 1 or 3 channels of 8 bits, and "
                    f"{examples.name} has {examples.shape[-1]} of {8 * examples.dtype.itemsize}"
                )
            found.append(RandAugment(data.rand_augment, data.rand_augment_strength, process))
        if data.mixup_alpha or data.cutmix_alpha:
            if self.config.batch_size // process.count % 2:
                raise InputError(
                    f"config.batch_size is {self.config.batch_size}, and must give each process an "
                    "even number of pictures: config.data.mixup_alpha and cutmix_alpha mix pairs"
                )
            alphas = data.mixup_alpha, data.cutmix_alpha
            found.append(augment.Mix(examples.num_classes, *alphas, process))
        return found

    def inputs(self, images: jax.Array) -> jax.Array:
        """Computes what the model sees of images, uint8 or uint16.

        The largest value of their dtype counts as 1. The data set's mean and standard deviation
        become 0 and 1, and images may become sequences of their pixels.

        Args:
            images: `(batch, height, width, channels)`.

        Returns:
            The same shape, or `(batch, height * width, channels)` for sequences.
        """
        data = self.config.data
        return preprocess(
            images, mean=data.mean, std=data.std, sequence=data.sequence,
            permutation=data.permutation, dtype=at_least_float32(self.dtype),
        )  # fmt: skip

    def loss(
        self, model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the sum of the terms of the loss, and the training accuracy."""
        labels = batch.get("soft_label", batch["label"])  # soft ones of mixed pictures
        logits, terms = self.loss_terms(model, self.inputs(batch["image"]), labels, rngs)
        loss = sum(terms.values())
        accuracy = jnp.mean(is_correct(logits, batch["label"]))
        return loss, {"loss": loss, "accuracy": accuracy, **terms}

    def loss_terms(
        self, model: nnx.Module, images: jax.Array, labels: jax.Array, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the logits and the terms of the loss, which are added up."""
        del rngs  # a model's own nnx.Dropout draws from its own stream
        return self._smoothed(model(images), labels)

    def _smoothed(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
        epsilon = self.config.loss.label_smoothing
        return logits, {"label_smoothing": losses.label_smoothing(logits, labels, epsilon)}

    def eval_step(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Computes the sums over the images of an evaluation batch without its padding."""
        return _sums(self.logits(model, batch), batch["label"], batch["mask"])

    def logits(self, model: nnx.Module, batch: Batch) -> jax.Array:
        """Computes the logits of a batch, `(batch, classes)`."""
        return model(self.inputs(batch["image"]))


class TerminatorClassification(ImageClassification):
    """Classifies images by a Terminator: the slow neural loss and the L2 norms are added."""

    def loss_terms(
        self, model: nnx.Module, images: jax.Array, labels: jax.Array, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the logits and the three terms of the loss."""
        weights = self.config.loss
        logits, inter = model(images, rngs=rngs, intermediates=True)
        factors = model.config.factors
        slow = losses.slow_neural(inter.hyper_kernels, factors, weights.channel_sum)
        _, terms = self._smoothed(logits, labels)
        terms["slow_neural"] = weights.slow_neural * slow
        terms["l2"] = losses.l2(nnx.state(model, nnx.Param), scale=weights.l2)
        return logits, terms

    def diagnostics(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Computes mean and deviation of each block's features, and the loss of each pair."""
        _, inter = model(self.inputs(batch["image"]), intermediates=True)
        found = {}
        for n, features in enumerate(inter.features):
            features = features.astype(at_least_float32(features.dtype))
            mean = across(jnp.mean(features), self.axis_name)
            variance = across(jnp.mean(jnp.square(features - mean)), self.axis_name)
            found |= {f"feature_mean/{n}": mean, f"feature_std/{n}": jnp.sqrt(variance)}
        kernels, factors = inter.hyper_kernels, model.config.factors
        for i, j in itertools.combinations(range(len(kernels)), 2):
            found[f"slow_neural/{i}-{j}"] = losses.slow_neural(
                [kernels[i], kernels[j]], [math.prod(factors[i:j])], self.config.loss.channel_sum
            )
        return found


class MaskedTokens(Task):
    """Predicts the masked bytes of texts that are laid out on a grid.

    A batch has `tokens`, `(batch, rows, columns)`, and their `index`, which decides what evaluation
    masks: the same positions of the same grid, however grids are put into batches.
    """

    unit = "grids of text"
    unit_of_speed = "grids"
    unit_of_evaluation = "hidden bytes"
    default_best_metric = "loss"

    def open(self, split: str) -> text.Text:
        """Opens a split of a text, and checks that the model knows its bytes."""
        data = self.config.data
        examples = text.open_text(
            data.name, split, data.grid, data_dir=data.data_dir, download=data.download
        )
        largest, vocabulary = int(examples.data.max()), self.model_config.vocabulary
        if largest >= vocabulary:
            raise InputError(
                f"{examples.name} has a byte {largest}, and the model is for bytes below "
                f"{vocabulary}: set config.model.options"
            )
        return examples

    def augmentations(
        self, examples: text.Text, process: Process
    ) -> list[grain.transforms.RandomMap]:
        """Returns the random start of each grid."""
        return [text.RandomStart(examples, process)]

    def train_mask(self, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Draws which tokens of a training batch are masked, a bool array of `shape`.

        Another ratio for each sample, from nearly nothing to all: `u²`, u uniform, a third on
        average, since a model learns least from grids with most of it masked. It is drawn from the
        sample's number in the whole batch: devices that share a batch mask what one would.
        """
        batch, axis = shape[0], self.axis_name
        first = 0 if axis is None else jax.lax.axis_index(axis) * batch

        def one(n: jax.Array) -> jax.Array:
            ratio_key, mask_key = jax.random.split(jax.random.fold_in(key, n))
            ratio = jnp.square(jax.random.uniform(ratio_key))
            return sample_mask(mask_key, ratio, shape[1:])

        return jax.vmap(one)(first + jnp.arange(batch))

    def eval_mask(self, index: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Returns which tokens of the grids `index`, `(n,)`, evaluation masks: `(n, *grid)`."""
        data = self.config.data
        key, ratio = jax.random.key(data.hidden_seed), jnp.asarray(data.hidden)
        return jax.vmap(lambda n: sample_mask(jax.random.fold_in(key, n), ratio, grid))(index)

    def _masked_logits(self, model: nnx.Module, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return model(jnp.where(mask, model.config.mask_token, tokens))

    def loss(
        self, model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the cross-entropy of masked tokens, averaged in a sample, then over samples."""
        tokens = batch["tokens"].astype(jnp.int32)
        mask = self.train_mask(rngs.dropout(), tokens.shape)
        logits = self._masked_logits(model, tokens, mask)

        def mean(values: jax.Array) -> jax.Array:
            masked = jnp.sum(jnp.where(mask, values, 0), (1, 2))
            return jnp.mean(masked / jnp.sum(mask, (1, 2), dtype=values.dtype))

        means = {name: mean(metric(logits, tokens)) for name, metric in METRICS.items()}
        return means["loss"], means

    def eval_step(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Computes the sums over the masked tokens of an evaluation batch without its padding."""
        tokens = batch["tokens"].astype(jnp.int32)
        mask = self.eval_mask(batch["index"], tokens.shape[1:])
        logits = self._masked_logits(model, tokens, mask)
        return _sums(logits, tokens, mask & batch["mask"][:, None, None])

    def baselines(self, train: text.Text, evaluation: text.Text) -> dict[str, float]:
        """Computes the losses by the frequencies of the training text: of bytes, and of pairs."""
        count = len(evaluation)
        mask = self.eval_mask(np.arange(count), self.config.data.grid)
        whole = evaluation.data[: count * evaluation.bytes_per_grid]
        unigram, bigram = ngrams.count(train.data).entropy(whole, np.asarray(mask).ravel())
        return {"unigram": unigram, "bigram": bigram}


def sample_mask(key: jax.Array, ratio: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws which positions are masked: each with probability `ratio`, at least one.

    Example:
      >>> bool(sample_mask(jax.random.key(0), jnp.array(0.0), (3, 4)).sum() == 1)
      True
    """
    noise = jax.random.uniform(key, shape)
    return noise <= jnp.maximum(ratio, noise.min())


def _sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    """Returns `count` and the sum of each metric where `mask` is True."""
    values = {name: metric(logits, labels) for name, metric in METRICS.items()}
    sums = {name: jnp.sum(jnp.where(mask, value, 0)) for name, value in values.items()}
    return {"count": jnp.sum(mask, dtype=jnp.int32), **sums}


# The task of each model in `models.MODELS`.
TASKS: dict[str, type[Task]] = {
    "terminator": TerminatorClassification,
    "lambda_resnet": ImageClassification,
    "nonlinear_transformer": MaskedTokens,
}


def make_task(config: ConfigDict, axis_name: str | None = None) -> Task:
    """Returns the task of a configuration; makes no model and opens no data yet.

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
    task = TASKS[model.name](config, model_config, axis_name)
    averaged = [PREFIX + name for name in task.metrics] if config.ema_decay else []
    if config.best_metric and config.best_metric not in (names := [*task.metrics, *averaged]):
        raise InputError(
            f"config.best_metric is {config.best_metric!r}, and must be one of {', '.join(names)}"
        )
    return task
