"""Convolutions shared by devices, over batch and channels: nothing is gathered."""

import pytest

CODE = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nets import normal, relative
from terminator_jax.ops.conv import fft_conv

kind, method = {kind!r}, {method!r}
mesh = jax.make_mesh((4, 2), ("b", "c"), (AxisType[kind],) * 2)


def all_of(x, k):
    out, pullback = jax.vjp(lambda x, k: fft_conv(x, k, method=method), x, k)
    return out, *pullback(out)


for lead, spec in ((), ()), ((8,), ("b",)):
    x, k = normal(8, 9, 6, 4), normal(*lead, 5, 6, 4, seed=2)
    shardings = [NamedSharding(mesh, P("b", None, None, "c")),
                 NamedSharding(mesh, P(*spec, None, None, "c"))]
    put = [jax.device_put(a, s) for a, s in zip((x, k), shardings)]
    program = jax.jit(all_of).lower(*put).compile()
    moves = re.findall(r"all-gather|all-to-all|collective-permute|dynamic-slice", program.as_text())
    assert not moves, moves
    found = program(*put)
    for one, expected in zip(found, jax.jit(all_of)(x, k)):
        assert relative(one, expected) < 1e-12
    for one, sharding in zip(found, [*shardings[:1], *shardings]):
        assert one.sharding.is_equivalent_to(sharding, one.ndim), (one.sharding, sharding)
"""

MAPPED = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from nets import normal, relative
from terminator_jax.ops.conv import fft_conv

mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,))
x, k = normal(4, 9, 6, 3), normal(5, 6, 3, seed=2)


def gradients(axis, x, k):
    loss = lambda x, k: jnp.sum(jnp.sin(fft_conv(x, k, method={method!r})))
    dx, dk = jax.grad(loss, (0, 1))(x, k)
    return dx, dk if axis is None else jax.lax.psum(dk, axis)


expected = jax.jit(functools.partial(gradients, None))(x, k)
split = jax.pmap(functools.partial(gradients, "d"), "d", in_axes=(0, None), out_axes=(0, None))
dx, dk = split(x.reshape(2, 2, 9, 6, 3), k)
assert relative(dx.reshape(x.shape), expected[0]) < 1e-12
assert relative(dk, expected[1]) < 1e-12
# shard_map sums the gradient of what all devices share by itself.
split = jax.jit(jax.shard_map(
    functools.partial(gradients, None), mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()),
))
x = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
for found, one in zip(split(x, k), expected):
    assert relative(found, one) < 1e-12
"""

methods = pytest.mark.parametrize("method", ["fft", "dft", "direct", "dense"])


@methods
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nothing_is_gathered(run_python, kind, method):
    run_python(CODE.format(kind=kind, method=method), devices=8, x64=True)


@methods
def test_inside_pmap_and_shard_map(run_python, method):
    run_python(MAPPED.format(method=method), devices=2, x64=True)
