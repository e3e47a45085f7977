"""Evaluates a run at its present state, and a checkpoint."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from ml_collections import ConfigDict

from terminator_jax import loading
from terminator_jax.data import own, pipeline
from terminator_jax.errors import InputError, one_line
from terminator_jax.layers import running
from terminator_jax.layers.running import is_calibrated
from terminator_jax.training import config as configs
from terminator_jax.training import integrity, provenance, report
from terminator_jax.training.averages import PREFIX, with_averages
from terminator_jax.training.checkpoint import (
    Checkpoints,
    latest_step,
    read_beside_training,
    read_config,
)
from terminator_jax.training.lock import one_writer
from terminator_jax.training.meter import weighted_means
from terminator_jax.training.metrics import METRICS, Scalars
from terminator_jax.training.parallel import process_shard
from terminator_jax.training.setup import Run, make_run
from terminator_jax.training.state import TrainState, ravel, split_model
from terminator_jax.training.step import make_eval_step, make_logits_step
from terminator_jax.training.tasks import Task

# Fields of which a checkpoint can only be evaluated with the value that it was trained with.
CHECKPOINT_FIELDS = ("model", "optimizer", "accumulate_steps", "ema_decay", "freeze")

# Batches of training images that running averages are computed from, at most.
CALIBRATION_BATCHES = 200


class Evaluation(NamedTuple):
    """The evaluation of a checkpoint.

    Attributes:
        step: the step of the checkpoint.
        scores: the metrics, and their `count`.
        unit: what `scores["count"]` counts.
        baselines: losses by name that need no model.
        metrics: those of the scores that the task averages.
    """

    step: int
    scores: dict[str, Any]
    unit: str
    baselines: Scalars
    metrics: tuple[str, ...]


def make_evaluate(run: Run, statistics: str = "running") -> Callable[[], Scalars]:
    """Returns a function that evaluates the run's state: `loss`, `accuracy` and so on, and `count`.

    With a moving average of the parameters, this is evaluated too: `ema_loss`, `ema_accuracy`.
    Every example counts once. Batches are in order and of one size, so that with the statistics of
    the batch a result can be repeated.

    Args:
        run: the run.
        statistics: see `make_eval_step`.
    """
    decay, eval_step = run.config.ema_decay, make_eval_step(run.task, run.model_def, statistics)
    steps = {"": run.parallel.compile(eval_step)}
    if decay:
        steps[PREFIX] = run.parallel.compile(
            lambda state, batch: eval_step(with_averages(state, decay), batch)
        )

    def evaluate() -> Scalars:
        size = run.config.eval_batch_size
        batches = pipeline.eval_batches(run.eval_data, size, process=process_shard())
        shards = map(run.parallel.shard_batch, batches)
        sums = [{name: step(run.state, shard) for name, step in steps.items()} for shard in shards]
        scores = {}
        for prefix in steps:
            means = weighted_means(part[prefix] for part in sums)
            count = means.pop("count")
            scores |= {prefix + name: mean for name, mean in means.items()}
        return {**scores, "count": count}

    return evaluate


def evaluate_checkpoint(
    workdir: Path,
    step: int | None = None,
    overrides: Sequence[str] = (),
    size: int | None = None,
    *,
    statistics: str = "running",
    calibrate: bool = False,
    bar: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint with the configuration that is kept beside it.

    The scores of a classifier are those of `report.describe`, others `loss`, `accuracy` and
    `count`.

    Args:
        workdir: the directory of the run.
        step: which checkpoint; None for the best.
        overrides: flags such as `--config.data.eval_split=train`.
        size: pixels per side of images and model, if not those that it was trained with.
        statistics: the `"running"` averages of training, or those of the `"batch"`.
        bar: whether to show how far it is.
        calibrate: whether running averages are computed anew, from the training images. The model
            for `load_model` is then written with them, unless a step, a size or overrides are
            given.

    Raises:
        InputError: if there is no such run or checkpoint, or a flag is wrong.
    """
    saved = read_config(workdir)
    config = configs.override(saved, overrides)
    known = provenance.read(workdir)
    for path, values in configs.differences(saved, config).items():
        if path.partition(".")[0] in CHECKPOINT_FIELDS:
            raise InputError(f"the checkpoints were made with another config.{path} ({values})")
    if latest_step(workdir) is None:
        raise InputError(f"{workdir} holds no checkpoints yet")
    config = _evaluated(provenance.as_trained(config, saved, known), saved, known)
    run = make_run(config, classes=known.classes if known else (), train=False)

    def restore() -> int:
        checkpoints, chosen = open_checkpoint(workdir, step, run.task)
        run.restore(checkpoints, chosen)
        return chosen

    chosen = read_beside_training(workdir, restore)
    if size is not None:
        run = _resized(run, size)
    if calibrate:
        _calibrate(run)
    elif statistics == "running" and not is_calibrated(_model(run)):
        raise InputError(
            f"the checkpoint of step {chosen} has no running averages: add --calibrate, which "
            "computes them from the training images, or --statistics=batch"
        )
    if calibrate or not (workdir / loading.FILE_NAME).exists():
        problem = "leave --step, --size and --config.… away"
        if step is None and size is None and not overrides:
            problem = _write_model(run, workdir, chosen)
        if problem and calibrate:
            print(f"warning: {loading.FILE_NAME} is not written: {problem}", file=sys.stderr)
    baselines = run.task.baselines(run.eval_data)
    if config.data.in_memory:
        run.eval_data = run.eval_data.load()
    describe = _describe if run.task.classifies else _average
    scores = describe(run, statistics, bar)
    return Evaluation(chosen, scores, run.task.unit_of_evaluation, baselines, run.task.metrics)


def _evaluated(
    config: ConfigDict, saved: ConfigDict, known: provenance.Provenance | None
) -> ConfigDict:
    """Returns the configuration with all of other own pictures as the split `test`.

    Of those that the run was trained with it is only the part that was held out.
    """
    chosen = [(c.data.eval_split, c.data.eval_fraction) for c in (saved, config)]
    is_other = own.is_own(config.data.name) and not provenance.is_same(saved, config, known)
    if is_other and chosen[0] == chosen[1]:
        config.data.eval_fraction = 1.0
    return config


def _write_model(run: Run, workdir: Path, step: int) -> str:
    """Writes the model for `load_model`; returns what is in the way, such as a trainer, or ""."""
    try:
        with one_writer(workdir):
            run.save_model(workdir, step)
    except (OSError, InputError) as error:  # a run that can only be read is evaluated all the same
        return one_line(error)
    return ""


def _average(run: Run, statistics: str, bar: bool) -> Scalars:
    del bar
    return make_evaluate(run, statistics)()


def _describe(run: Run, statistics: str, bar: bool) -> dict[str, Any]:
    """Returns the scores of a classifier: the metrics, and the report on the model that is kept."""
    states, kept = {"": run.state}, ""
    if run.config.ema_decay:
        states[PREFIX] = with_averages(run.state, run.config.ema_decay)
        kept = PREFIX if run.task.best_metric.startswith(PREFIX) else ""
    found = {prefix: _logits(run, state, statistics, bar) for prefix, state in states.items()}
    scores = report.describe(*found[kept], run.eval_data.classes)
    if run.config.ema_decay:
        scores["described"] = "averages" if kept else "parameters"
    for prefix, (logits, labels) in found.items():
        scores |= {prefix + name: mean for name, mean in _metrics(logits, labels).items()}
    return scores


def _metrics(logits: np.ndarray, labels: np.ndarray) -> Scalars:
    return {
        name: float(np.asarray(metric(logits, labels), np.float64).mean())
        for name, metric in METRICS.items()
    }


def _logits(
    run: Run, state: TrainState, statistics: str, bar: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and the labels of all evaluation images."""
    step = run.parallel.compile(make_logits_step(run.task, run.model_def, statistics))
    batches = pipeline.eval_batches(run.eval_data, run.config.eval_batch_size)
    total = -(-len(run.eval_data) // run.config.eval_batch_size)
    logits, labels = [], []
    for batch in tqdm.tqdm(batches, total=total, unit="batch", disable=not bar, leave=False):
        found = step(state, run.parallel.shard_batch(batch))
        logits.append(np.asarray(found)[batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
    return np.concatenate(logits), np.concatenate(labels)


def _model(run: Run) -> nnx.Module:
    """Returns the run's model in the memory of this process."""
    model_state = jax.device_get(run.state.model_state)
    return run.model_def.merge(run.chosen_parameters(), model_state)


def _calibrate(run: Run) -> None:
    """Replaces the model's running averages by those of the training images, not augmented."""
    if not run.task.classifies:
        raise InputError("--calibrate is for models of images: leave it away")
    data, size = run.task.open(run.config.data.train_split), run.config.batch_size
    rows = np.random.default_rng(run.config.seed).permutation(len(data))
    steps = range(min(len(data) // size, CALIBRATION_BATCHES))
    batches = (data.read(np.sort(rows[n * size : (n + 1) * size])) for n in steps)
    # On one device, where there is no axis to average over.
    model = dataclasses.replace(run.task, axis_name=None).make_model()
    nnx.update(model, nnx.state(jax.tree.map(jnp.asarray, _model(run)), nnx.Not(nnx.RngState)))
    running.calibrate(model, (run.task.inputs(batch["image"]) for batch in batches))
    _, _, model_state = split_model(model, run.model_def.trained)
    run.state = run.state._replace(model_state=run.parallel.replicate(model_state))


def _resized(run: Run, size: int) -> Run:
    """Returns the run with `size` pixels per side; says on stderr what changes in the model."""
    model = _model(run)
    if run.config.data.sequence or not hasattr(model, "resized"):
        raise InputError("--size is for models of pictures that have a `resized`: leave it away")
    try:
        model, changes = model.resized((size, size))
    except ValueError as error:
        raise InputError(f"--size={size}: {one_line(error)}") from error
    print(*changes, sep="\n", file=sys.stderr)
    if run.task.best_metric.startswith(PREFIX):
        print("the averages of the parameters are evaluated", file=sys.stderr)
    config = run.config.copy_and_resolve_references()
    config.data.resize, config.ema_decay = size, 0.0  # one choice of parameters is left
    task = dataclasses.replace(run.task, config=config, model_config=model.config)
    model_def, params, model_state = split_model(model, run.model_def.trained)
    return dataclasses.replace(
        run,
        config=config,
        task=task,
        eval_data=task.open(config.data.eval_split, run.eval_data.classes),
        model_def=model_def,
        state=run.state._replace(params=ravel(params), model_state=model_state),
    )


def open_checkpoint(workdir: Path, step: int | None, task: Task) -> tuple[Checkpoints, int]:
    """Opens the checkpoints of a run.

    Args:
        workdir: the directory of the run.
        step: which checkpoint; None for the best.
        task: the task of the run.

    Returns:
        The checkpoints, and the step of the one that is meant.

    Raises:
        InputError: if there is no such checkpoint, or it is damaged.
    """
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} holds no checkpoints yet")
    checkpoints = Checkpoints(workdir, best_metric=task.best_metric, read_only=True)
    chosen = _choose(checkpoints, workdir, step)
    if problem := integrity.problem(checkpoints.directory, chosen):
        raise InputError(f"the checkpoint of step {chosen} in {checkpoints.directory} {problem}")
    return checkpoints, chosen


def _choose(checkpoints: Checkpoints, workdir: Path, step: int | None) -> int:
    steps = checkpoints.steps
    if not steps:
        raise InputError(f"{workdir} holds no checkpoints yet")
    if step is None:
        return steps[-1] if checkpoints.best is None else checkpoints.best
    if step not in steps:
        raise InputError(
            f"{workdir} holds no checkpoint of step {step}: there are {', '.join(map(str, steps))}"
        )
    return step
