"""The prediction of masked bytes of text: data, masks, loss and evaluation."""

from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.data import ngrams, text
from terminator_jax.data.augment import Process
from terminator_jax.errors import InputError
from terminator_jax.training import metrics
from terminator_jax.training.metrics import Metrics
from terminator_jax.training.tasks.task import DeviceBatch, Task


class MaskedTokens(Task):
    """Predicts the masked bytes of texts that are laid out on a grid.

    A batch has `tokens`, `(batch, rows, columns)`, and their `index`, which decides what evaluation
    masks: the same positions of the same grid, however grids are put into batches.
    """

    unit = "grids of text"
    unit_of_speed = "grids"
    unit_of_evaluation = "hidden bytes"
    default_best_metric = "loss"

    def open(self, split: str, classes: Sequence[str] = ()) -> text.Text:
        """Opens a split of a text, and checks that the model knows its bytes."""
        del classes  # a text has none
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
        self, model: nnx.Module, batch: DeviceBatch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, Metrics]:
        """Computes the cross-entropy of masked tokens, averaged in a sample, then over samples."""
        tokens = batch["tokens"].astype(jnp.int32)
        mask = self.train_mask(rngs.dropout(), tokens.shape)
        logits = self._masked_logits(model, tokens, mask)

        def mean(values: jax.Array) -> jax.Array:
            masked = jnp.sum(jnp.where(mask, values, 0), (1, 2))
            return jnp.mean(masked / jnp.sum(mask, (1, 2), dtype=values.dtype))

        means = {name: mean(metric(logits, tokens)) for name, metric in metrics.METRICS.items()}
        return means["loss"], means

    def eval_step(self, model: nnx.Module, batch: DeviceBatch) -> Metrics:
        """Computes the sums over the masked tokens of an evaluation batch without its padding."""
        tokens = batch["tokens"].astype(jnp.int32)
        mask = self.eval_mask(batch["index"], tokens.shape[1:])
        logits = self._masked_logits(model, tokens, mask)
        return metrics.sums(logits, tokens, mask & batch["mask"][:, None, None])

    def baselines(self, evaluation: text.Text) -> dict[str, float]:
        """Computes the losses by the frequencies of the training text: of bytes, and of pairs."""
        train = self.open(self.config.data.train_split)
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
