"""Averages of batch statistics: kept in training, used in evaluation, computed anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

import terminator_jax
from terminator_jax.layers import (
    BatchStandardization,
    GroupInstanceBatchStandardization,
    LocalBranch,
    LocalHyperZZW,
    SFNEBlock,
    SlowWidths,
)
from terminator_jax.layers.batch_norm import batch_norm
from terminator_jax.layers.running import (
    is_calibrated,
    running_averages,
    use_batch_statistics,
)

pytestmark = pytest.mark.usefixtures("x64")

SMALL = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})
BRANCHES = (LocalBranch(1, "u", "h"), LocalBranch(3, "x", "x"))
CASES = {
    "2-D": dict(size=(4, 4)),
    "1-D": dict(size=(6,), operator="convolution"),
    "causal": dict(size=(6,), operator="convolution", causal=True),
}
call = nnx.jit(SFNEBlock.__call__)


def make(size, **kwargs):
    """A block whose biases and scalars are not 0: the fused block leaves them away."""
    return filled(
        lambda: SFNEBlock(
            size, 4, 3, branches=BRANCHES, widths=SMALL, groups=4, param_dtype=jnp.float64,
            rngs=nnx.Rngs(0), **kwargs,
        )
    )  # fmt: skip


def batches(size, count=3, batch=5):
    return [normal(batch, *size, 4, seed=n) for n in range(count)]


def averages(block):
    return {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(block, nnx.BatchStat))
    }


@pytest.mark.parametrize("case", CASES)
def test_formula_and_fused_block_keep_and_use_the_same(case):
    block = make(**CASES[case])
    reference = make(**CASES[case], implementation="reference")
    xs = batches(block.size)
    for x in xs:
        call(block, x), call(reference, x)
    found, expected = averages(block), averages(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
        assert np.std(value) > 0 or name.endswith("count"), name
    block.eval(), reference.eval()
    assert relative(call(block, xs[0]), call(reference, xs[0])) < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_in_evaluation_a_sample_does_not_depend_on_its_batch(case):
    block = make(**CASES[case])
    xs = batches(block.size)
    trained = [call(block, x) for x in xs]
    kept = averages(block)
    block.eval()
    together = call(block, xs[0])
    for n in range(5):
        assert relative(call(block, xs[0][n : n + 1])[0], together[n]) < 1e-10
    assert relative(together, trained[0]) > 1e-3
    for name, value in averages(block).items():
        np.testing.assert_array_equal(value, kept[name])
    block.train()
    assert relative(call(block, xs[0]), trained[0]) < 1e-10
    block.eval()
    use_batch_statistics(block)
    assert relative(call(block, xs[0]), trained[0]) < 1e-10


def test_the_first_batches_count_alike_and_later_ones_by_the_momentum():
    norm = BatchStandardization(4)
    xs = batches((6,), count=14)
    for x in xs:
        norm(x)
    mean = np.zeros(4)
    for n, x in enumerate(xs, start=1):
        mean += max(1 / n, 1 - norm.averages.momentum) * (np.mean(x, (0, 1)) - mean)
    np.testing.assert_allclose(norm.averages.mean[...], mean, rtol=1e-6)
    assert norm.averages.count[...] == 14


def test_calibration_is_one_plain_average():
    layer, xs = filled(lambda: LocalHyperZZW(3, 4, hidden=3, rngs=nnx.Rngs(0))), batches((4, 4), 15)
    model = nnx.Sequential(layer.slow_net)
    assert not is_calibrated(model)
    for _ in range(2):  # what was before is forgotten
        terminator_jax.calibrate(model, xs)
        assert is_calibrated(model)
        [found] = running_averages(model)
        expected = LocalHyperZZW(3, 4, hidden=3, rngs=nnx.Rngs(0)).slow_net
        expected(jnp.concatenate(xs))
        assert relative(found.pooled[...], expected.averages.pooled[...]) < 1e-6
        assert found.use_running_average and found.momentum < 1


def _fails():
    yield normal(5, 4, 4, 4)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("xs", "error", "says"),
    [
        (list, ValueError, "there are no batches"),
        (lambda: [normal(5, 4, 4, 4), normal(5, 4, 4, 3)], ValueError, r"\(5, 4, 4, 3\)"),
        (_fails, OSError, "the disk is gone"),
    ],
)
def test_a_calibration_that_fails_changes_nothing(xs, error, says):
    block = make((4, 4))
    terminator_jax.calibrate(block, batches((4, 4), 2))
    kept = averages(block)
    with pytest.raises(error, match=says):
        terminator_jax.calibrate(block, xs())
    for name, value in averages(block).items():
        np.testing.assert_array_equal(value, kept[name])
    assert all(found.use_running_average for found in running_averages(block))


def test_batch_normalizations_are_calibrated_too():
    """As in a LambdaResNet: mean and variance of all batches, and the momentum is as it was."""
    norm = batch_norm(4, momentum=0.7, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model, xs = nnx.Sequential(norm), np.asarray(batches((6,), 3))
    terminator_jax.calibrate(model, xs)
    assert relative(norm.mean[...], np.mean(xs, (0, 1, 2))) < 1e-6
    assert relative(norm.var[...], np.mean(np.var(xs, (1, 2)), 0)) < 1e-6
    assert norm.use_running_average and norm.momentum == 0.7
    expected = (xs[0] - np.mean(xs[0], (0, 1))) / np.sqrt(np.var(xs[0], (0, 1)) + 1e-5)
    assert relative(model(xs[0]), expected) > 1e-3
    use_batch_statistics(model)
    assert relative(model(xs[0]), expected) < 1e-5


def test_standardizations_of_a_known_number_of_features():
    """The same as without in training; in evaluation by the averages."""
    x, other = batches((6, 4), 2)
    for make, groups in ((BatchStandardization, None), (GroupInstanceBatchStandardization, 2)):
        plain = make() if groups is None else make(groups)
        norm = make(4) if groups is None else make(groups, 4)
        assert not jax.tree.leaves(nnx.state(plain))
        assert relative(norm(x), plain(x)) < 1e-6
        norm.eval()
        assert relative(norm(x), plain(x)) < 1e-4
        assert relative(norm(other), plain(other)) > 1e-2
        assert relative(norm(other[:1])[0], norm(other)[0]) < 1e-12
    with pytest.raises(ValueError, match="leave num_features=4 away"):
        BatchStandardization(4, causal=True)
