"""A run from its configuration to its last checkpoint.

    outcome = train(config.read("experiments/digits.py"), Path("runs/digits"))

`train` checks everything before it writes anything; `_steps` is the loop.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import jax

from terminator_jax.data import pipeline
from terminator_jax.data.errors import InputError
from terminator_jax.training.checkpoint import (
    Checkpoints,
    check_workdir,
    latest_step,
    write_config,
)
from terminator_jax.training.config import ConfigDict
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.interrupt import Interrupt
from terminator_jax.training.logs import Logs
from terminator_jax.training.metrics import Meter, Scalars
from terminator_jax.training.parallel import anywhere, own_process
from terminator_jax.training.setup import Run, make_run
from terminator_jax.training.state import TrainState
from terminator_jax.training.step import make_train_step
from terminator_jax.training.trace import Trace


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps done.
        total: steps that the configuration asks for.
        was_done: whether there was nothing left to do.
        best_step: the step of the best checkpoint, if any epoch was finished.
        best: what the evaluation gave at that step.
    """

    step: int
    total: int
    was_done: bool
    best_step: int | None
    best: Scalars


def train(config: ConfigDict, workdir: Path) -> Outcome:
    """Trains from the last checkpoint, if any, until the epochs are over or Ctrl-C is pressed.

    Args:
        config: as `config.read` gives it.
        workdir: the directory of the run; created if there is none.

    Raises:
        InputError: if something does not fit, and then nothing has been written; or if the loss is
            no longer finite.
    """
    check_workdir(workdir, config)
    run = make_run(config)
    was_done = latest_step(workdir) == run.total
    examples = None if was_done else (run.read(run.train), run.read(run.eval))
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, quality=run.source.quality)
    try:
        step = run.total if was_done else _train(run, workdir, checkpoints, *examples)
        best = checkpoints.best
        return Outcome(
            step, run.total, was_done, best, {} if best is None else checkpoints.metrics(best)
        )
    finally:
        checkpoints.close()


def train_batches(run: Run, examples: pipeline.Examples) -> grain.DatasetIterator:
    """The training batches of this process, augmented as the configuration says."""
    process = own_process()
    return pipeline.train_batches(
        examples,
        run.config.batch_size,
        seed=run.config.seed,
        augmentations=run.source.augmentations(run.config, examples, process),
        process=process,
    )


def _train(
    run: Run,
    workdir: Path,
    checkpoints: Checkpoints,
    train_examples: pipeline.Examples,
    eval_examples: pipeline.Examples,
) -> int:
    """Trains from the last checkpoint or from the start; returns the step at which it stopped."""
    batches, start = train_batches(run, train_examples), checkpoints.latest
    if start is None:
        state, start = run.new_state(), 0
    else:
        named, position = checkpoints.restore(start, run.like, run.mode.replicated)
        state = run.packed(named)
        batches.set_state(position)
    first = jax.process_index() == 0
    logs = Logs(
        workdir, step=start, total=run.total, steps_per_epoch=run.steps_per_epoch, enabled=first,
        noun=run.source.logged,
    )  # fmt: skip
    trace = Trace(workdir, enabled=first and run.config.profile)
    with logs, trace, Interrupt() as interrupt:
        logs.say(_opening(run, start))
        baselines = run.source.baselines(run.config, train_examples, eval_examples)
        if baselines:
            named = "  ".join(f"{name} {loss:.4f}" for name, loss in baselines.items())
            logs.say(f"eval loss without a model: {named}")
        step = make_train_step(run.task, run.structure, run.solver, run.schedule)
        train_step = run.mode.compile(step, donate=True)
        evaluate = make_evaluate(run, eval_examples)
        return _steps(
            run, workdir, train_step, state, start, batches, evaluate, checkpoints, logs,
            interrupt, trace,
        )  # fmt: skip


def _opening(run: Run, start: int) -> str:
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return (
        f"{run.train.name}: {len(run.train):,} {run.source.noun}, {run.config.epochs} epochs of "
        f"{run.steps_per_epoch} steps; {run.config.model.name} {run.config.model.variant}: "
        f"{run.num_parameters:,} parameters; {count} × {kind}, {run.config.parallel}; "
        + (f"going on from step {start}" if start else "compiling takes a while")
    )


def _steps(
    run: Run,
    workdir: Path,
    train_step: Callable,
    state: TrainState,
    step: int,
    batches: grain.DatasetIterator,
    evaluate: Callable[[TrainState], Scalars],
    checkpoints: Checkpoints,
    logs: Logs,
    interrupt: Interrupt,
    trace: Trace,
) -> int:
    """The loop. Nothing in it waits for the devices but what the log and checkpoints need."""
    config, alone, start = run.config, jax.process_count() == 1, step
    meter = Meter(config.batch_size, run.source.logged)
    while step < run.total:
        state, metrics = train_step(state, run.mode.place(next(batches)))
        step += 1
        meter.add(metrics)
        trace.step(step - start, metrics)
        if step == start + 1:
            jax.block_until_ready(metrics)
            logs.compiled()
            meter.restart()
        logs.step()

        ends_epoch = step % run.steps_per_epoch == 0
        logs_now = step % config.log_every_steps == 0 or ends_epoch
        stops = (alone or logs_now) and anywhere(interrupt.asked)
        saves = ends_epoch or stops or _divides(config.checkpoint_every_steps, step)
        scores = None
        if logs_now or saves:
            means = meter.read()
            _check_finite(means, step, checkpoints)
            logs.train(step, means)
        if ends_epoch:
            scores = evaluate(state)
            logs.evaluation(step, scores, meter.read_epoch())
            # Before the checkpoint: after a kill in between, this step is trained again.
            if jax.process_index() == 0 and checkpoints.is_best(scores):
                run.save_model(workdir, state, step)
        if saves:
            checkpoints.save(step, run.mode.whole(run.named(state)), batches.get_state(), scores)
            meter.restart()
        if stops:
            break
    return step


def _divides(every: int, step: int) -> bool:
    """Whether `step` is one of every so many; 0 is never."""
    return every > 0 and step % every == 0


def _check_finite(means: Scalars, step: int, checkpoints: Checkpoints) -> None:
    """Raises InputError if the loss is not finite, before that is saved."""
    if not math.isfinite(means["loss"]):
        last = checkpoints.latest
        raise InputError(
            f"the loss is {means['loss']} at step {step}: lower config.optimizer.learning_rate; "
            + (f"the last checkpoint is of step {last}" if last else "there is no checkpoint yet")
        )
