"""Convolutions keep a bound on memory, and many at once do not block each other."""

import jax
import jax.numpy as jnp
import pytest

from terminator_jax.ops.conv import fft_conv

MANY = """
import functools, os
import jax, jax.numpy as jnp
from nets import normal
from terminator_jax.ops.conv import fft_conv

xs = [normal(2, 256, 4, seed=n, dtype="float32") for n in range(32)]
kernels = [normal(256, 4, seed=99 + n, dtype="float32") for n in range(32)]


@functools.partial(jax.jit, static_argnums=0)
def gradients(method, xs, kernels):
    def loss(xs, kernels):
        outs = [fft_conv(x, k, method=method) for x, k in zip(xs, kernels)]
        return sum(jnp.sum(jnp.sin(out)) for out in outs)

    return jax.grad(loss, (0, 1))(xs, kernels)


for method in "fft", "dft":
    first = gradients(method, xs, kernels)
    for _ in range(200):
        last = gradients(method, xs, kernels)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last)):
        assert jnp.array_equal(a, b), method
print(len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 99)
"""


@pytest.mark.parametrize("threads", [4])
def test_many_at_once_do_not_hang(run_python, monkeypatch, threads):
    """32 independent ones with their gradients, 200 times, on a pool of that many threads."""
    monkeypatch.setenv("NPROC", str(threads))
    assert int(run_python(MANY, timeout=240)) > threads


@pytest.mark.parametrize("method", ["fft", "dft"])
def test_keeps_a_bound_on_memory(method):
    """Compiled only: XLA says what a program takes besides its arguments and results."""
    x = kernel = jax.ShapeDtypeStruct((1, 2**20, 64), jnp.float32)
    bound = 7 * 2**28  # the least is six arrays such as x

    def temporary(max_bytes, gradient):
        def convolve(x, kernel):
            kernel = kernel[0]
            return fft_conv(x, kernel, method=method, max_bytes=max_bytes)

        def both(x, kernel):
            out, pullback = jax.vjp(convolve, x, kernel)
            return out, pullback(out)

        program = jax.jit(both if gradient else convolve).lower(x, kernel).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(bound, gradient=False) <= bound
    assert temporary(bound, gradient=True) <= bound
    if method == "dft":  # on a CPU, FFTs find room in what the copies leave
        assert temporary(None, gradient=True) > bound
