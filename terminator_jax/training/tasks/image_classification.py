"""The classification of images: data, augmentation, loss and evaluation."""

import itertools
import math
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax import losses
from terminator_jax.classes import match
from terminator_jax.data import augment, sources
from terminator_jax.data.augment import Process
from terminator_jax.data.examples import LabelledPictures
from terminator_jax.data.randaugment import RandAugment
from terminator_jax.errors import InputError
from terminator_jax.models import preprocess
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.standardize import across
from terminator_jax.training import metrics
from terminator_jax.training.metrics import Metrics
from terminator_jax.training.tasks.task import DeviceBatch, Task


class ImageClassification(Task):
    """Classifies images by the cross-entropy with smoothed labels."""

    unit = "pictures"
    unit_of_speed = "images"
    unit_of_evaluation = "pictures"
    default_best_metric = "accuracy"
    classifies = True

    def open(self, split: str, classes: Sequence[str] = ()) -> LabelledPictures:
        """Opens a split of images with labels, and checks that the model is made for them."""
        data = self.config.data
        images = sources.open_split(
            data.name,
            split,
            data_dir=data.data_dir,
            download=data.download,
            resize=data.resize,
            channels=data.channels,
            eval_fraction=data.eval_fraction,
            split_seed=data.split_seed,
            stratify=data.stratify,
        )
        if classes:
            try:
                numbers = match(images.classes, classes, by=data.match_classes)
            except ValueError as error:
                hint = "rename them, or set --config.data.match_classes=number"
                raise InputError(f"{images.name}: {error}: {hint}") from error
            images = images.with_classes(numbers, tuple(classes))
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

    def augmentations(
        self, examples: LabelledPictures, process: Process
    ) -> list[grain.transforms.RandomMap]:
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
        self, model: nnx.Module, batch: DeviceBatch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the sum of the terms of the loss, and the training accuracy."""
        labels = batch.get("soft_label", batch["label"])  # soft ones of mixed pictures
        logits, terms = self.loss_terms(model, self.inputs(batch["image"]), labels, rngs)
        loss = sum(terms.values())
        accuracy = jnp.mean(metrics.is_correct(logits, batch["label"]))
        return loss, {"loss": loss, "accuracy": accuracy, **terms}

    def loss_terms(
        self, model: nnx.Module, images: jax.Array, labels: jax.Array, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the logits and the terms of the loss, which are added up."""
        del rngs  # a model's own nnx.Dropout draws from its own stream
        logits = model(images)
        return logits, {"cross_entropy": self._cross_entropy(logits, labels)}

    def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the cross-entropy with smoothed labels."""
        return losses.label_smoothing(logits, labels, self.config.loss.label_smoothing)

    def eval_step(self, model: nnx.Module, batch: DeviceBatch) -> Metrics:
        """Computes the sums over the images of an evaluation batch without its padding."""
        return metrics.sums(self.logits(model, batch), batch["label"], batch["mask"])

    def logits(self, model: nnx.Module, batch: DeviceBatch) -> jax.Array:
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
        return logits, {
            "cross_entropy": self._cross_entropy(logits, labels),
            "slow_neural": weights.slow_neural * slow,
            "l2": losses.l2(nnx.state(model, nnx.Param), scale=weights.l2),
        }

    def diagnostics(self, model: nnx.Module, batch: DeviceBatch) -> Metrics:
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
