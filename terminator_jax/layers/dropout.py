"""Channel dropout whose masks do not depend on how a batch is split over devices."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.ops.channels_first import broadcast_channels
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.standardize import AxisName


class ChannelDropout(nnx.Module):
    """Drops whole channels of single samples, and scales the others to keep the expectation.

    The mask of a sample is drawn from the key and the sample's index in the whole batch, so that
    training on one device and on many gives the same result.

    Example:
      >>> x = jnp.ones((4, 8, 8, 12))
      >>> y = ChannelDropout(0.5)(x, rngs=nnx.Rngs(dropout=0))
      >>> sorted(set(y[0].ravel().tolist()))
      [0.0, 2.0]

    Args:
      rate: the probability of dropping a channel, in `[0, 1)`.
      axis_name: the mapped axis over which the batch is split, if any.
      deterministic: whether nothing is dropped; `train()` and `eval()` set it, as for
        `nnx.Dropout`.
    """

    def __init__(self, rate: float, *, axis_name: AxisName = None, deterministic: bool = False):
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate, self.axis_name, self.deterministic = rate, axis_name, deterministic

    def __call__(
        self,
        x: jax.Array,
        *,
        rngs: nnx.Rngs | None = None,
        channels_first: bool = False,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Drops channels; none without `rngs`.

        Args:
          x: `(batch, *spatial, channels)`.
          rngs: with a `dropout` stream.
          channels_first: whether x is `(channels, batch, *spatial)`.
          deterministic: overrides the mode that `train()` and `eval()` set.
        """
        x = floating(x)
        deterministic = self.deterministic if deterministic is None else deterministic
        if rngs is None or self.rate == 0 or deterministic:
            return x
        if channels_first:
            return x * broadcast_channels(self._scale(x.shape[1], x.shape[0], rngs).T, x)
        scale = self._scale(x.shape[0], x.shape[-1], rngs)
        return x * jnp.expand_dims(scale, range(1, x.ndim - 1)).astype(x.dtype)

    def _scale(self, batch: int, channels: int, rngs: nnx.Rngs) -> jax.Array:
        """Draws the factors of each sample's channels, `(batch, channels)`."""
        first = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * batch
        key = rngs.dropout()
        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(first + jnp.arange(batch))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, (channels,)))(keys)
        return keep.astype(jnp.float32) / (1 - self.rate)
