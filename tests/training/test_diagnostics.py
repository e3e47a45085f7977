"""What is logged of the inside of a training, against the same computed by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax import losses
from terminator_jax.training import config as configs
from terminator_jax.training import loop
from terminator_jax.training.diagnostics import make_diagnose
from terminator_jax.training.setup import make_run

TINY = "tests/training/tiny.py"
OPTIONS = ["factors=(12,2)", "skips=((),())", "dropout=(0.0,0.0)", "global_layers=(1,1)"]
FIELDS = [f"--config.model.options.{option}" for option in OPTIONS]


def test_diagnostics_of_a_terminator(unoptimized):
    run = make_run(configs.read(TINY, [*FIELDS, "--config.parallel=jit"]))
    batch = run.train_batch(0)
    found = make_diagnose(run)(batch)

    model = run.model_def.merge(run.model_def.unravel(run.state.params), run.state.model_state)
    logits = nnx.jit(lambda model, x: model(x, intermediates=True))
    _, inter = logits(model, run.task.inputs(batch["image"]))
    for n, features in enumerate(inter.features):
        np.testing.assert_allclose(found[f"feature_mean/{n}"], features.mean(), atol=1e-5)
        np.testing.assert_allclose(found[f"feature_std/{n}"], features.std(), rtol=1e-4)
    pair = losses.slow_neural(inter.hyper_kernels, model.config.factors)
    np.testing.assert_allclose(found["slow_neural/0-1"], pair, rtol=1e-5)
    assert {f"{kind}_norm/{part}" for kind in ("gradient", "update") for part in
            ("slow", "fast", "head")} <= found.keys()  # fmt: skip


def test_the_parts_add_up_to_the_norm_of_the_step(tmp_path):
    """Logged at their steps, at the whole gradient's norm up to the one step between them."""
    fields = ["diagnostics_every_steps=2", "epochs=1", "log_every_steps=1"]
    fields += ["optimizer.warmup_epochs=0.0", "optimizer.learning_rate=1e-12"]
    fields += ["model.options.dropout=(0.0,)"]
    config = configs.read(TINY, [f"--config.{field}" for field in fields])
    loop.train(config, tmp_path)
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    looks = [line for line in lines if line["kind"] == "diagnostics"]
    assert [line["step"] for line in looks] == list(range(2, 23, 2))
    norms = {line["step"]: line["gradient_norm"] for line in lines if line["kind"] == "train"}
    for line in looks:
        parts = [value for name, value in line.items() if name.startswith("gradient_norm/")]
        np.testing.assert_allclose(np.linalg.norm(parts), norms[line["step"]], rtol=1e-3)
        assert len(parts) == 3


def test_parts_by_name():
    from terminator_jax.training.diagnostics import norms_by_part
    from terminator_jax.training.state import split_model

    run = make_run(configs.read(TINY))
    model_def, params, _ = split_model(run.task.make_model())
    sizes = {part: float(norm) ** 2 for part, norm in
             norms_by_part(jnp.ones(run.num_parameters), model_def).items()}  # fmt: skip
    head = sum(leaf.size for leaf in jax.tree.leaves(params["head"]))
    np.testing.assert_allclose(sizes["head"], head, rtol=1e-5)
    np.testing.assert_allclose(sum(sizes.values()), run.num_parameters, rtol=1e-5)
    slow = nnx.state(run.task.make_model().blocks[0].slow_net)
    assert sizes["slow"] > sum(leaf.size for leaf in jax.tree.leaves(slow))
