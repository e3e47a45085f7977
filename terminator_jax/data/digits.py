"""The digits of scikit-learn as a TFDS data set, prepared without network and without TensorFlow.

builder = open_builder()
builder.info.splits["test"].num_examples  # 360
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax.data import preparation
from terminator_jax.data.cache import user_cache
from terminator_jax.errors import InputError, cannot_write, one_line

TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits of 8×8 pixels; every fifth one, from the first, is the test set."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The pictures of sklearn.datasets.load_digits, 0..16 made 0..255."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 43 people, 8×8 pixels in 17 shades of grey.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation="E. Alpaydin, C. Kaynak: Optical recognition of handwritten digits, 1998",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # slow to import, and only ever needed once

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            if (index % TEST_EVERY == 0) == test:
                yield index, {"image": preparation.png(image[..., None]), "label": int(label)}


def _builder(data_dir: Path) -> Digits:
    return Digits(data_dir=data_dir, file_format="array_record")


def open_builder(data_dir: Path | None = None) -> tfds.core.DatasetBuilder:
    """Returns the builder of the digits, prepared on first use.

    Any number of processes may call this at once.

    Args:
        data_dir: where to keep the data set, by default `tfds` in the user's cache directory.

    Raises:
        InputError: if the directory cannot be written, or what is in it cannot be read.
    """
    data_dir = data_dir or user_cache() / "tfds"
    try:
        return preparation.prepared(_builder, data_dir)
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a directory that can be"
        raise cannot_write(f"the data set of the digits in {data_dir}", error, hint) from error
    except Exception as error:  # whatever damaged files make TFDS raise
        raise InputError(
            f"{data_dir / Digits.name} cannot be read: {one_line(error)}: remove this folder, so "
            "that it is prepared again"
        ) from error
