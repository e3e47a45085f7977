"""What each kind of task is trained and evaluated on: an entry of `EXAMPLES` for each.

The other half of a kind, what is computed of a batch, is in `task.KINDS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from terminator_jax.data import augment, ngrams, sources, text
from terminator_jax.data.augment import Process
from terminator_jax.data.errors import InputError
from terminator_jax.data.pictures import Pictures, Stored
from terminator_jax.data.pipeline import Examples
from terminator_jax.training.checkpoint import accuracy
from terminator_jax.training.masked_tokens import hidden_in_evaluation
from terminator_jax.training.task import Task, check_data


class Source(NamedTuple):
    """Where batches come from.

    Attributes:
        noun: what an example is called.
        counted: what an evaluation counts.
        logged: what the log counts by the second.
        quality: the number of an evaluation that is largest for the best checkpoint.
        open: `(config, split)` to the examples of a split, which have `name`, `read` and `load`.
        check: raises InputError if `(task, examples)` do not fit each other.
        augmentations: of `(config, examples, process)`, for training.
        baselines: of `(config, training examples, evaluation examples)`: losses by name that need
            no model, of the same evaluation.
    """

    noun: str
    counted: str
    logged: str
    quality: Callable[[dict[str, float]], float]
    open: Callable[[ConfigDict, str], Any]
    check: Callable[[Task, Any], None]
    augmentations: Callable[..., Sequence[grain.transforms.RandomMap]]
    baselines: Callable[[ConfigDict, Any, Any], dict[str, float]]


def open_pictures(config: ConfigDict, split: str) -> Stored | Pictures:
    """A split of pictures with labels."""
    data = config.data
    return sources.open_split(
        data.name,
        split,
        data_dir=data.data_dir,
        download=data.download,
        resize=data.resize,
        eval_fraction=data.eval_fraction,
        split_seed=data.split_seed,
    )


def _check_pictures(task: Task, pictures: Stored | Pictures) -> None:
    check_data(task, pictures.shape, pictures.num_classes, pictures.name)


def _augment_pictures(
    config: ConfigDict, pictures: Examples, process: Process
) -> list[grain.transforms.RandomMap]:
    del pictures
    found, data = [], config.data
    if data.padding:
        found.append(augment.RandomCrop(data.padding, data.padding_mode, process))
    if data.flip:
        found.append(augment.RandomFlip(process))
    return found


def _open_text(config: ConfigDict, split: str) -> text.Text:
    data = config.data
    return text.open_text(
        data.name, split, data.grid, data_dir=data.data_dir, download=data.download
    )


def _check_text(task: Task, examples: text.Text) -> None:
    largest, vocabulary = int(examples.data.max()), task.model_config.vocabulary
    if largest >= vocabulary:
        raise InputError(
            f"{examples.name} has a byte {largest}, and the model is for bytes below {vocabulary}:"
            " set config.model.options"
        )


def _text_baselines(
    config: ConfigDict, train: text.Text, evaluation: text.Text
) -> dict[str, float]:
    """By the frequencies in the training text of bytes, and of bytes after the right one before."""
    data, count = config.data, len(evaluation)
    hidden = hidden_in_evaluation(data.hidden_seed, np.arange(count), data.hidden, data.grid)
    whole = evaluation.data[: count * evaluation.cells]
    unigram, bigram = ngrams.count(train.data).entropy(whole, np.asarray(hidden).ravel())
    return {"unigram": unigram, "bigram": bigram}


EXAMPLES = {
    "pictures": Source(
        noun="pictures",
        counted="pictures",
        logged="images",
        quality=accuracy,
        open=open_pictures,
        check=_check_pictures,
        augmentations=_augment_pictures,
        baselines=lambda *_: {},
    ),
    "text": Source(
        noun="grids of text",
        counted="hidden bytes",
        logged="grids",
        quality=lambda scores: -scores["loss"],
        open=_open_text,
        check=_check_text,
        augmentations=lambda config, examples, process: [text.RandomStart(examples, process)],
        baselines=_text_baselines,
    ),
}
