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
    ChannelDropout,
    GroupInstanceBatchStandardization,
    LocalBranch,
    LocalHyperZZW,
    LocalSlowNet,
    SFNEBlock,
    SlowWidths,
    linen,
)
from terminator_jax.layers.batch_norm import batch_norm
from terminator_jax.layers.running import (
    is_calibrated,
    running_averages,
    use_batch_statistics,
)
from terminator_jax.models import TabularConfig, TabularTerminator, Terminator, TerminatorConfig

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
    make = lambda: filled(lambda: LocalHyperZZW(3, 4, hidden=3, rngs=nnx.Rngs(0)))  # noqa: E731
    layer, xs = make(), batches((4, 4), 15)
    model = OfOneMap(layer)
    assert not is_calibrated(model)
    for _ in range(2):  # what was before is forgotten
        terminator_jax.calibrate(model, xs)
        assert is_calibrated(model)
        [found] = running_averages(model)
        expected = make()
        whole = jnp.concatenate(xs)
        expected(whole, whole)
        assert relative(found.mean[...], expected.context.mean[...]) < 1e-6
        assert found.use_running_average and found.momentum < 1


class OfOneMap(nnx.Module):
    """A layer of two maps as one of one."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, x)


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [(), (2,)])
def test_standardizations_with_averages_and_without(groups, causal):
    """The same in training; in evaluation by the averages, or always by the batch."""
    x, other = (a.astype(jnp.float32) for a in batches((6,), 2))
    kind = GroupInstanceBatchStandardization if groups else BatchStandardization
    options = dict(causal=True, length=6) if causal else {}
    norm = kind(4, *groups, **options)
    plain = kind(4, *groups, causal=causal, track_running_stats=False)
    assert not jax.tree.leaves(nnx.state(plain))
    norm(other), norm(x)
    norm.eval(), plain.eval()
    assert relative(plain(x), kind(4, *groups, **options)(x)) < 1e-6
    terminator_jax.calibrate(norm, [x])
    assert relative(norm(x), plain(x)) < 1e-4
    assert relative(norm(other), plain(other)) > 1e-2
    assert relative(norm(other[:1])[0], norm(other)[0]) < 1e-6


TINY = TerminatorConfig(
    size=(4, 4), channels=4, num_classes=3, factors=(1,), skips=((),), dropout=(0.5,),
    branches=BRANCHES, groups=4, global_hidden=3, global_layers=(1,), local_hidden=3,
    local_layers=1, channel_hidden=3, channel_layers=1, interaction_channel_hidden=3,
    interaction_spatial_hidden=3, interaction_layers=1,
)  # fmt: skip


def terminator(**options):
    return filled(lambda: Terminator(TINY, rngs=nnx.Rngs(0), **options))


# What keeps averages, called with one map (2, 4, 4, 4) of float32.
AVERAGING = {
    "BS": lambda: BatchStandardization(4),
    "G-IBS": lambda: GroupInstanceBatchStandardization(4, 2),
    "LocalHyperZZW": lambda: OfOneMap(
        filled(lambda: LocalHyperZZW(3, 4, hidden=3, rngs=nnx.Rngs(0)))
    ),
    "SFNEBlock": lambda: SFNEBlock(
        (4, 4), 4, 1, branches=BRANCHES, widths=SMALL, groups=4, implementation="reference",
        rngs=nnx.Rngs(0),
    ),
    "Terminator, resized": lambda: terminator().resized((3, 3)).model.resized((4, 4)).model,
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGING)
def test_evaluation_without_averages(name, unoptimized):
    """It says so, or gives NaN where the count is traced, until a batch was seen."""
    model, x = AVERAGING[name](), normal(2, 4, 4, 4, dtype=np.float32)
    run = nnx.jit(lambda model, x: model(x))
    model.eval()
    for call in (model, jax.jit(model)):
        with pytest.raises(ValueError, match="use_batch_statistics"):
            call(x)
    assert np.isnan(run(model, x)).any()
    terminator_jax.use_batch_statistics(model)
    by_batch = run(model, x)
    assert np.isfinite(by_batch).all()
    jax.eval_shape(model, x)  # changes nothing
    model.eval()
    assert np.isnan(run(model, x)).any(), "nothing was averaged"
    model.train()
    run(model, x)
    model.eval()
    assert relative(run(model, x), by_batch) < 1e-2
    assert np.isfinite(model(x)).all()


def test_stacked_blocks_without_averages(unoptimized):
    """`nnx.scan` over what `nnx.vmap` made has a count for each, of which any may be 0."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return SFNEBlock((4, 4), 4, 1, branches=BRANCHES, widths=SMALL, groups=4, rngs=rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)

    blocks, x = make(nnx.Rngs(0)), normal(2, 4, 4, 4, dtype=np.float32)
    blocks.eval()
    assert not is_calibrated(blocks) and np.isnan(run(blocks, x)).all()
    blocks.train()
    run(blocks, x)
    assert is_calibrated(blocks)
    blocks.averages.count.set_value(jnp.array([1.0, 0.0], jnp.float32))
    assert not is_calibrated(blocks)


def test_a_linen_module_without_averages():
    x = normal(2, 4, 4, 4, dtype=np.float32)
    module = linen.BatchStandardization(4, use_running_average=True)
    out, variables = module.init_with_output(jax.random.key(0), x)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="use_batch_statistics"):
        module.apply(variables, x)
    assert np.isnan(jax.jit(module.apply)(variables, x)).all()


def test_kernels_change_nothing():
    """A generator can be asked twice, and in every transformation, in training too."""
    net, x = filled(lambda: LocalSlowNet(3, 4, hidden=3, rngs=nnx.Rngs(0))), normal(2, 4, 4, 4)
    expected = net(x)
    assert not jax.tree.leaves(nnx.state(net, nnx.BatchStat))
    assert relative(net(x), expected) == 0
    assert relative(jax.jit(lambda x: net(x))(x), expected) < 1e-5
    assert relative(jax.vmap(net)(x[None])[0], expected) < 1e-5
    assert np.abs(jax.grad(lambda x: jnp.sum(net(x)))(x)).max() > 0
    graph, state = nnx.split(block := make((4, 4)))
    jax.jit(lambda state: [net() for net in nnx.merge(graph, state).slow_nets().values()])(state)
    assert block.local.context.count[...] == 0


@pytest.mark.parametrize("name", ["BS", "G-IBS", "LocalHyperZZW", "SFNEBlock"])
def test_evaluation_needs_no_mapped_axis(name, unoptimized):
    """What was trained under `pmap` is evaluated outside of it, as with `nnx.BatchNorm`."""
    model, x = AVERAGING[name](), normal(2, 4, 4, 4, dtype=np.float32)
    model(x)
    model.eval()
    expected = model(x)
    for layer in running_averages(model):
        layer.axis_name = "batch"
    model.axis_name = "batch"
    assert relative(model(x), expected) == 0


@pytest.mark.parametrize("name", ["ChannelDropout", "Terminator", "TabularTerminator"])
def test_nothing_is_dropped_in_evaluation(name, unoptimized):
    """Also with a key, as by `nnx.Dropout`; in training as before."""
    make, x = {
        "ChannelDropout": (lambda: ChannelDropout(0.5), jnp.ones((2, 4, 4, 4))),
        "Terminator": (terminator, normal(2, 4, 4, 4, dtype=np.float32)),
        "TabularTerminator": (
            lambda: TabularTerminator(
                TabularConfig(features=5, num_classes=3, widths=(4,), dropout=0.5),
                rngs=nnx.Rngs(0),
            ), normal(2, 5, dtype=np.float32),
        ),
    }[name]  # fmt: skip
    model = make()
    run = nnx.jit(lambda model, x, rngs: model(x, rngs=rngs))
    without = run(model, x, None)
    assert (run(model, x, nnx.Rngs(dropout=1)) != without).any()
    model.eval()
    without = run(model, x, None)
    np.testing.assert_array_equal(run(model, x, nnx.Rngs(dropout=1)), without)
    if hasattr(model, "resized"):
        assert model.resized((5, 5)).model.blocks[0].dropout.deterministic
    model.train()
    assert (run(model, x, nnx.Rngs(dropout=1)) != run(model, x, None)).any()


def test_a_dropout_is_told_at_construction_or_in_the_call():
    x, rngs = jnp.ones((2, 4, 4, 8)), lambda: nnx.Rngs(dropout=1)
    for layer in (ChannelDropout(0.5), ChannelDropout(0.5, deterministic=True)):
        assert (layer(x, rngs=rngs(), deterministic=False) == 0).any()
        assert (layer(x, rngs=rngs(), deterministic=True) == x).all()
    assert (ChannelDropout(0.5, deterministic=True)(x, rngs=rngs()) == x).all()
    for module in (linen.ChannelDropout(0.5), linen.ChannelDropout(0.5, deterministic=True)):
        out = module.apply({}, x, rngs={"dropout": jax.random.key(0)})
        assert (out == x).all() == module.deterministic


def test_what_the_package_has_to_offer():
    assert {"calibrate", "load_model", "use_batch_statistics"} <= set(dir(terminator_jax))
    assert terminator_jax.use_batch_statistics is use_batch_statistics
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        terminator_jax.nothing  # noqa: B018
