"""Channel dropout: what it drops, how much, and when nothing at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import normal

from terminator_jax.layers import ChannelDropout


def dropped(x, rate=0.25, seed=0):
    return jax.jit(ChannelDropout(rate))(x, rngs=nnx.Rngs(dropout=seed))


@pytest.mark.parametrize("size", [(5,), (3, 4)])
def test_drops_whole_channels_of_single_samples(size):
    y = np.asarray(dropped(jnp.ones((64, *size, 50))))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert (np.ptp(y, axis=tuple(range(1, y.ndim - 1))) == 0).all()
    kept = y.reshape(64, -1, 50)[:, 0] > 0
    # 3200 draws: five deviations.
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / kept.size)
    assert len(np.unique(kept, axis=0)) == 64


@pytest.mark.parametrize("size", [(5,), (3, 4)])
def test_channels_may_come_first(size):
    x, rngs = normal(6, *size, 50, dtype=np.float32), lambda: nnx.Rngs(dropout=0)
    layer = ChannelDropout(0.25)
    first = layer(jnp.moveaxis(x, -1, 0), rngs=rngs(), channels_first=True)
    np.testing.assert_array_equal(jnp.moveaxis(first, 0, -1), layer(x, rngs=rngs()))
    np.testing.assert_array_equal(layer(x, channels_first=True), x)


def test_a_samples_mask_does_not_depend_on_the_others():
    x = normal(8, 3, 12, dtype=np.float32)
    np.testing.assert_array_equal(dropped(x[:2]), dropped(x)[:2])


def test_keys_decide():
    x = jnp.ones((8, 3, 12))
    np.testing.assert_array_equal(dropped(x, seed=3), dropped(x, seed=3))
    assert (dropped(x, seed=3) != dropped(x, seed=4)).any()


def test_nothing_is_dropped_without_a_key_or_a_rate():
    x = normal(8, 3, 12, dtype=np.float32)
    np.testing.assert_array_equal(ChannelDropout(0.9)(x), x)
    np.testing.assert_array_equal(dropped(x, rate=0.0), x)


def test_keeps_the_dtype():
    assert dropped(jnp.ones((2, 3, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_wrong_rate(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got"):
        ChannelDropout(rate)
