"""Kar2 and Kar3: trajectories of the original, and the contracts that optax asks of a transform."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import load
from hypothesis import given
from hypothesis import strategies as st

from terminator_jax.optim import kar2, kar3, scale_by_kar2, scale_by_kar3

SCALE_BY = {"kar2": scale_by_kar2, "kar3": scale_by_kar3}
ALIAS = {"kar2": kar2, "kar3": kar3}
BETAS = {"kar2": (0.95,), "kar3": (0.5, 0.95)}

both = pytest.mark.parametrize("name", ["kar2", "kar3"])


def a_tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "nested": [jnp.asarray(rng.normal(size=5), dtype), jnp.asarray(rng.normal(), dtype)],
    }


def run(solver, params, gradients):
    """The parameters after each step, under jit."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = solver.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, trajectory = solver.init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        trajectory.append(params)
    return trajectory


def reference(params, gradients, betas, rates):
    """The formulas in NumPy, on one array; `rates` gives a learning rate a step."""
    averages, trajectory = [np.zeros_like(params) for _ in betas], []
    for g, rate in zip(gradients, rates, strict=True):
        params = params - rate * (np.sign(g) + sum(np.sign(m) for m in averages))
        averages = [b * m + (1 - b) * g for b, m in zip(betas, averages, strict=True)]
        trajectory.append(params)
    return trajectory


@pytest.mark.parametrize("case", ["kar2", "kar3", "kar3_b"])
def test_follows_the_original(x64, case):
    golden = getattr(load("kar"), case)
    betas = [float(beta) for beta in np.atleast_1d(golden["betas"])]
    solver = ALIAS[case[:4]](float(golden["lr"]), *betas)
    trajectory = run(solver, jnp.asarray(golden["init"]), jnp.asarray(golden["grads"]))
    np.testing.assert_allclose(jnp.stack(trajectory), golden["params"], rtol=1e-12, atol=0)


@both
def test_default_betas(x64, name):
    golden = getattr(load("kar"), name)
    trajectory = run(
        ALIAS[name](float(golden["lr"])), jnp.asarray(golden["init"]), jnp.asarray(golden["grads"])
    )
    np.testing.assert_allclose(jnp.stack(trajectory), golden["params"], rtol=1e-12, atol=0)


@both
@given(data=st.data())
def test_follows_the_formulas_on_any_tree(name, data):
    """Zeros, repeated signs and sudden turns are what decides, so draw few, small values."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=3), "shapes")
    betas = data.draw(st.tuples(*[st.sampled_from([0.0, 0.5, 0.75])] * len(BETAS[name])), "betas")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    leaves = [rng.normal(size=shape) for shape in shapes]
    gradients = [[rng.integers(-2, 3, shape) / 2 for shape in shapes] for _ in range(5)]
    with jax.enable_x64(True):
        found = run_eagerly(ALIAS[name](0.125, *betas), leaves, gradients)
    for i, leaf in enumerate(leaves):
        wanted = reference(leaf, [g[i] for g in gradients], betas, [0.125] * 5)
        np.testing.assert_allclose([tree[i] for tree in found], wanted, rtol=1e-12, atol=1e-15)


def run_eagerly(solver, params, gradients):
    with jax.disable_jit():
        return run(solver, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, gradients))


@both
def test_a_step_counts_signs_of_the_past_only(name):
    """The second gradient turns round: its own average must not have seen it yet."""
    scale = SCALE_BY[name]()
    first, state = scale.update(jnp.array([3.0, -2.0, 0.0]), scale.init(jnp.zeros(3)))
    second, _ = scale.update(jnp.array([-100.0, -2.0, 5.0]), state)
    n = len(BETAS[name])
    np.testing.assert_array_equal(first, [1, -1, 0])
    np.testing.assert_array_equal(second, [-1 + n, -1 - n, 1])


@both
def test_zero_gradients_keep_the_parameters(name):
    params = a_tree()
    trajectory = run(ALIAS[name](0.1), params, [jax.tree.map(jnp.zeros_like, params)] * 3)
    chex.assert_trees_all_equal(trajectory[-1], params)


@both
def test_learning_rate_schedule(x64, name):
    schedule = optax.linear_schedule(0.5, 0.0, 4)
    gradients = np.random.default_rng(3).normal(size=(6, 7))
    trajectory = run(ALIAS[name](schedule), jnp.ones(7), jnp.asarray(gradients))
    wanted = reference(np.ones(7), gradients, BETAS[name], [0.5, 0.375, 0.25, 0.125, 0.0, 0.0])
    np.testing.assert_allclose(trajectory, wanted, rtol=1e-12, atol=1e-15)


@both
def test_inject_hyperparams(name):
    """The rate and the betas become state, can be changed between steps, and nothing else moves."""
    params, gradients = a_tree(), [a_tree(seed) for seed in range(1, 5)]
    plain = run(ALIAS[name](0.25), params, gradients)
    injected = optax.inject_hyperparams(ALIAS[name])(0.25)
    chex.assert_trees_all_close(run(injected, params, gradients)[-1], plain[-1], rtol=1e-6)

    state = injected.init(params)
    assert set(state.hyperparams) == {"learning_rate", "beta" if name == "kar2" else "beta1"} | (
        set() if name == "kar2" else {"beta2"}
    )
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = jax.jit(injected.update)(gradients[0], state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


@both
def test_multi_steps(name):
    """Two half batches a step are one step with the mean of their gradients."""
    params, gradients = a_tree(), [a_tree(seed) for seed in range(1, 7)]
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(gradients[::2], gradients[1::2], strict=True)
    ]
    accumulated = run(optax.MultiSteps(ALIAS[name](0.25), every_k_schedule=2), params, gradients)
    chex.assert_trees_all_equal(accumulated[0], params)
    chex.assert_trees_all_close(accumulated[1::2], run(ALIAS[name](0.25), params, means), rtol=1e-6)


@both
def test_masked(name):
    """What the mask leaves out goes through untouched, and has no state."""
    params, gradient = a_tree(), a_tree(1)
    masked = optax.masked(SCALE_BY[name](), {"kernel": True, "nested": False})
    state = masked.init(params)
    updates, _ = masked.update(gradient, state, params)
    chex.assert_trees_all_equal(updates["nested"], gradient["nested"])
    np.testing.assert_array_equal(updates["kernel"], np.sign(gradient["kernel"]))
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(3, 4)] * len(BETAS[name])


@both
@pytest.mark.parametrize("wrap", [lambda f: f, optax.inject_hyperparams], ids=["plain", "inject"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeps_dtypes(name, wrap, dtype):
    params = a_tree(dtype=dtype)
    solver = wrap(ALIAS[name])(learning_rate=0.1)
    state = solver.init(params)
    updates, after = jax.jit(solver.update)(a_tree(1, dtype), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    updates, _ = jax.jit(solver.update)(a_tree(1, dtype), after, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@both
def test_averages_in_their_own_dtype(name):
    """bfloat16 cannot add a thousandth to one; a float32 average of bfloat16 gradients can."""
    params = jnp.zeros(1, jnp.bfloat16)
    scale = SCALE_BY[name](*[0.999] * len(BETAS[name]), mu_dtype=jnp.float32)
    state = scale.init(params)
    for _ in range(2):
        updates, state = jax.jit(scale.update)(jnp.ones(1, jnp.bfloat16), state)
    assert updates.dtype == jnp.bfloat16
    for average in state:
        assert average.dtype == jnp.float32
        np.testing.assert_allclose(average, 1 - 0.999**2, rtol=1e-4)


@both
def test_mu_dtype_of_the_alias(name):
    state = ALIAS[name](0.1, mu_dtype=jnp.float32).init(a_tree(dtype=jnp.bfloat16))
    averages = jax.tree.leaves(state[0])
    assert len(averages) == 3 * len(BETAS[name])
    assert {average.dtype for average in averages} == {jnp.dtype("float32")}


@both
def test_second_step_compiles_nothing(name):
    chex.clear_trace_counter()
    params, gradient = a_tree(), a_tree(1)
    solver = ALIAS[name](optax.cosine_decay_schedule(0.1, 10))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, gradient):
        updates, state = solver.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = solver.init(params)
    for _ in range(3):
        params, state = step(params, state, gradient)


@both
def test_state_is_a_plain_pytree(name):
    """Flattened to named arrays and put back, as a checkpoint does, training goes on the same."""
    params, solver = a_tree(), ALIAS[name](optax.linear_schedule(0.5, 0.0, 4))
    state = solver.init(params)
    _, state = solver.update(a_tree(1), state, params)
    leaves, structure = jax.tree.flatten(state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert len(set(names)) == len(leaves) == 3 * len(BETAS[name]) + 1
    assert any(f".mu{'' if name == 'kar2' else '2'}['kernel']" in n for n in names)
    restored = structure.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    chex.assert_trees_all_equal(
        solver.update(a_tree(2), restored, params), solver.update(a_tree(2), state, params)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_kar2(1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: kar2(0.1, -0.5), r"beta must be in \[0, 1\), got -0.5"),
        (lambda: kar2(0.1, float("nan")), r"beta must be in \[0, 1\), got nan"),
        (lambda: scale_by_kar3(1.5), r"beta1 must be in \[0, 1\), got 1.5"),
        (lambda: kar3(0.1, 0.5, 1.0), r"beta2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_betas(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sharding_is_kept(run_python):
    """Averages lie where their parameters lie, and steps leave everything there."""
    run_python(
        """
        import jax, numpy as np, optax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from terminator_jax.optim import kar2, kar3

        def check(tree, like):
            for name, x in like.items():
                found = tree[name].sharding
                assert found.is_equivalent_to(x.sharding, x.ndim), (name, found, x.sharding)

        def check_solver(solver, params):
            def step(params, state, gradient):
                updates, state = solver.update(gradient, state, params)
                return optax.apply_updates(params, updates), state

            state = solver.init(params)
            after, new_state = jax.jit(step)(params, state, params)
            for tree in (*state[0], after, *new_state[0]):
                check(tree, params)
            np.testing.assert_allclose(after["split"], 0.9, rtol=1e-6)

        for axis_type in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
            params = {
                name: jax.device_put(np.ones((16, 3), np.float32), NamedSharding(mesh, spec))
                for name, spec in {"split": PartitionSpec("data"), "whole": PartitionSpec()}.items()
            }
            assert len(params["split"].sharding.device_set) == 8
            for solver in (kar2(0.1), kar3(0.1)):
                check_solver(solver, params)
        print("checked")
        """,
        devices=8,
    )
