"""Predicts the classes of pictures, as `python -m terminator_jax.predict` does."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from terminator_jax.data.named import Named, read_named
from terminator_jax.data.pictures import converted, fitted, resized
from terminator_jax.loading import LoadedModel


def read_fitting(
    loaded: LoadedModel,
    paths: Sequence[str],
    fit: bool,
    *,
    report: Callable[[str], None],
    others: list[str],
) -> Iterator[Named]:
    """Reads the pictures that paths name and that fit the model, resized as in training.

    Args:
        loaded: the model.
        paths: see `read_named`, which `report` and `others` are for too.
        fit: whether pictures of another size or colour are scaled and converted.
        report: called with a line on each picture that cannot be read or does not fit.
        others: files that are no pictures by their names are added to it.
    """
    shape, data = loaded.picture_shape, loaded.config["data"]
    channels = shape[-1] if data.get("channels") else 0  # converted in training too
    stdin = sys.stdin.buffer
    for name, image in read_named(paths, stdin, channels=shape[-1], report=report, others=others):
        try:
            if channels:
                image = converted(image, channels)
            found = fitted(image, shape) if fit else resized(image, data["resize"])
            loaded.check(found[None])
        except ValueError:
            hint = "" if fit else ": --fit scales and converts it"
            report(f"{name} has {_size(image.shape)}, and the model is for {_size(shape)}{hint}")
        else:
            yield name, found


def predict(
    loaded: LoadedModel, named: Iterable[Named], top: int
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yields the name of each picture and its `top` likeliest classes with their probabilities."""
    for names, images in _batches(named, loaded.config["eval_batch_size"]):
        for name, values in zip(names, probabilities(loaded.logits(images)), strict=True):
            order = (-values).argsort(kind="stable")[:top]
            yield name, [(loaded.classes[n], float(values[n])) for n in order]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax of logits `(..., classes)`, in float64.

    Example:
        >>> probabilities(np.array([0.0, 0.0])).tolist()
        [0.5, 0.5]
    """
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{height}×{width} pixels of {channels} channel{'s'[: channels > 1]}"


def _batches(named: Iterable[Named], size: int) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Names and pictures that are computed together, all of one dtype."""
    for _, group in itertools.groupby(named, lambda pair: pair[1].dtype):
        while part := list(itertools.islice(group, size)):
            names, images = zip(*part, strict=True)
            yield names, np.stack(images)
