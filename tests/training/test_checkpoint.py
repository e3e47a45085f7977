"""Which checkpoints are kept, and that they come back as they were."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training.checkpoint import (
    Checkpoints,
    check_workdir,
    latest_step,
    read_config,
    write_config,
)
from terminator_jax.training.state import new_state, split_model


@pytest.fixture(scope="module")
def state():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    _, params, model_state = split_model(model)
    return new_state(params, model_state, optax.adam(0.1), seed=7)


def test_the_last_and_the_best_are_kept(state, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest, checkpoints.best, checkpoints.steps) == (None, None, [])
    kept = []
    for step, accuracy in [(5, None), (10, 0.5), (15, None), (20, 0.9), (25, None), (30, 0.8)]:
        scores = accuracy and {"accuracy": accuracy, "loss": 1.0}
        checkpoints.save(step, state, {"next_index": step}, scores)
        kept.append((checkpoints.best, checkpoints.steps))
    assert kept == [
        (None, [5]),
        *((10, [10]), (10, [10, 15])),
        *((20, [20]), (20, [20, 25]), (20, [20, 30])),
    ]
    assert checkpoints.metrics(20) == {"accuracy": 0.9, "loss": 1.0}
    checkpoints.close()
    again = Checkpoints(tmp_path, read_only=True)
    assert (again.latest, again.best, again.steps) == (30, 20, [20, 30])
    assert latest_step(tmp_path) == 30
    again.close()


def test_a_state_comes_back_bit_for_bit(state, tmp_path):
    noisy = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).integers(0, 2**20, x.shape)).astype(x.dtype),
        state,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, noisy, {"next_index": 3}, None)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found, batches = checkpoints.restore(3, jax.eval_shape(lambda: state), sharding)
    assert batches == {"next_index": 3}
    assert jax.tree.structure(found) == jax.tree.structure(noisy)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(noisy), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())
    checkpoints.close()


def test_of_equals_the_last_is_the_best(state, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state, {}, {"accuracy": 0.9})
    assert (checkpoints.best, checkpoints.steps) == (3, [3])
    checkpoints.close()


@pytest.mark.parametrize("metric", ["loss", "ema_loss"])
def test_of_a_loss_the_smallest_is_the_best(state, tmp_path, metric):
    checkpoints = Checkpoints(tmp_path, best_metric=metric)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
        checkpoints.save(step, state, {}, {metric: loss})
    assert (checkpoints.best, checkpoints.steps) == (2, [2, 3])
    checkpoints.close()


def test_a_state_of_another_shape(run_python):
    """In a process of its own: orbax leaves unfinished tasks behind when a restore fails."""
    run_python(
        """
        import tempfile
        from pathlib import Path

        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from terminator_jax.errors import InputError
        from terminator_jax.training.checkpoint import Checkpoints
        from terminator_jax.training.state import new_state, split_model

        _, params, model_state = split_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        state = new_state(params, model_state, optax.adam(0.1), seed=7)
        checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
        checkpoints.save(1, state, {}, None)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for wrong in (state._replace(opt_state=()), state._replace(step=jnp.zeros(2, jnp.int32))):
            try:
                checkpoints.restore(1, jax.eval_shape(lambda: wrong), sharding)
            except InputError as error:
                assert "checkpoint of step 1 " in str(error) and "does not fit" in str(error)
                assert "\\n" not in str(error)
            else:
                raise SystemExit("restored")
        """
    )


def test_a_half_written_checkpoint_is_ignored(state, tmp_path):
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
    assert latest_step(tmp_path) is None
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest is None
    checkpoints.save(3, state, {"next_index": 3}, None)
    assert checkpoints.latest == latest_step(tmp_path) == 3
    checkpoints.close()


@pytest.mark.parametrize("time", [10**30, 10**24, -(10**24)])
def test_a_damaged_time_of_a_checkpoint(time, state, tmp_path):
    """Such a year cannot be, or does not fit into the system's numbers."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, {}, None)
    checkpoints.close()
    file = tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"commit_timestamp_nsecs": time}))
    with pytest.raises(InputError, match=r"a checkpoint in .*checkpoints is damaged .*: remove it"):
        Checkpoints(tmp_path, read_only=True)


def test_a_full_disk_is_no_damage(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")  # without a name, as of a library

    monkeypatch.setattr(ocp, "CheckpointManager", refuse)
    with pytest.raises(OSError, match="No space left") as raised:
        Checkpoints(tmp_path)
    assert not isinstance(raised.value, InputError)


def test_the_configuration_beside_them(state, tmp_path):
    config = configs.default_config()
    workdir = tmp_path / "a" / "b"
    check_workdir(workdir, config)
    assert not workdir.exists()
    with pytest.raises(InputError, match="holds no run"):
        read_config(workdir)
    workdir.mkdir(parents=True)
    write_config(workdir, config)
    other = configs.override(configs.default_config(), ["--config.seed=1"])
    check_workdir(workdir, other)  # no checkpoint yet: nothing is lost
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, state, {}, None)
    checkpoints.close()
    check_workdir(workdir, config)
    with pytest.raises(InputError, match=r"another configuration: seed \(0 there, 1 now\)"):
        check_workdir(workdir, other)
    (workdir / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: .*Expecting"):
        read_config(workdir)
