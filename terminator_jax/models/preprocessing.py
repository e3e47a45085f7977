"""Turns pictures as data sets have them into what a model sees."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def preprocess(
    images: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sequence: bool = False,
    permutation: Sequence[int] = (),
    dtype=jnp.float32,
) -> jax.Array:
    """Computes `(images / largest - mean) / std`, and makes sequences of pixels where asked to.

    Args:
      images: unsigned integers, `(batch, height, width, channels)`; `largest` is that of their
        dtype, such as 255.
      mean: one value per channel, or one for all, of pixels in [0, 1].
      std: the same of their standard deviation.
      sequence: whether pictures become sequences of their pixels, row after row.
      permutation: the order of a sequence's pixels; empty for their own.
      dtype: dtype of the result.

    Returns:
      `(batch, height, width, channels)`, or `(batch, height * width, channels)` of sequences.

    Example:
      >>> images = jnp.full((1, 2, 2, 1), 255, jnp.uint8)
      >>> print(preprocess(images, mean=(0.5,), std=(0.25,)).reshape(4))
      [2. 2. 2. 2.]
    """
    mean, std = (jnp.asarray(x, dtype)[None, None, None] for x in (mean, std))
    x = (images.astype(dtype) / jnp.iinfo(images.dtype).max - mean) / std
    if sequence:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height * width, channels)
    return x[:, np.array(permutation)] if permutation else x
