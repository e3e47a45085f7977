"""Convolutions shared by devices, over batch and channels: nothing is gathered."""

import pytest

METHODS = ["fft", "dft", "direct"]

CODE = """
import functools, itertools, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nets import normal, relative
from terminator_jax.ops.conv import fft_conv

kind = {kind!r}
mesh = jax.make_mesh((4, 2), ("b", "c"), (AxisType[kind],) * 2)


def all_of(method, x, k):
    out, pullback = jax.vjp(lambda x, k: fft_conv(x, k, method=method), x, k)
    return out, *pullback(out)


for method, (lead, spec) in itertools.product({methods}, [((), ()), ((8,), ("b",))]):
    compute = jax.jit(functools.partial(all_of, method))
    x, k = normal(8, 9, 6, 4), normal(*lead, 5, 6, 4, seed=2)
    shardings = [NamedSharding(mesh, P("b", None, None, "c")),
                 NamedSharding(mesh, P(*spec, None, None, "c"))]
    put = [jax.device_put(a, s) for a, s in zip((x, k), shardings)]
    program = compute.lower(*put).compile()
    moves = re.findall(r"all-gather|all-to-all|collective-permute|dynamic-slice", program.as_text())
    assert not moves, (method, moves)
    found = program(*put)
    for one, expected in zip(found, compute(x, k)):
        assert relative(one, expected) < 1e-12, method
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


def gradients(method, axis, x, k):
    loss = lambda x, k: jnp.sum(jnp.sin(fft_conv(x, k, method=method)))
    dx, dk = jax.grad(loss, (0, 1))(x, k)
    return dx, dk if axis is None else jax.lax.psum(dk, axis)


for method in {methods}:
    alone, mapped = (functools.partial(gradients, method, axis) for axis in (None, "d"))
    expected = jax.jit(alone)(x, k)
    split = jax.pmap(mapped, "d", in_axes=(0, None), out_axes=(0, None))
    dx, dk = split(x.reshape(2, 2, 9, 6, 3), k)
    assert relative(dx.reshape(x.shape), expected[0]) < 1e-12, method
    assert relative(dk, expected[1]) < 1e-12, method
    # shard_map sums the gradient of what all devices share by itself.
    split = jax.jit(jax.shard_map(
        alone, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()),
    ))
    put = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
    for found, one in zip(split(put, k), expected):
        assert relative(found, one) < 1e-12, method
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nothing_is_gathered(run_python, kind):
    run_python(CODE.format(kind=kind, methods=METHODS), devices=8, x64=True)


def test_inside_pmap_and_shard_map(run_python):
    run_python(MAPPED.format(methods=METHODS), devices=2, x64=True)
