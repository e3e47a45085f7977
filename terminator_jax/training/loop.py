"""Trains a model from its configuration to its last checkpoint.

result = train(config.read("experiments/digits.py"), Path("runs/digits"))
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.errors import InputError
from terminator_jax.training import card, history
from terminator_jax.training.checkpoint import (
    Checkpoints,
    check_workdir,
    latest_step,
    set_damaged_aside,
    write_config,
)
from terminator_jax.training.config import ConfigDict
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.initial import initialize
from terminator_jax.training.interrupt import StopSignals
from terminator_jax.training.lock import one_writer
from terminator_jax.training.logs import Logs
from terminator_jax.training.metrics import Meter, Scalars
from terminator_jax.training.parallel import any_process
from terminator_jax.training.setup import Run, make_run
from terminator_jax.training.step import make_train_step
from terminator_jax.training.trace import Trace

# What is in the state, in the words of a message.
STATE_NAMES = {
    "params": "the parameters",
    "model_state": "the running averages",
    "opt_state": "the averages of the optimizer",
}


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        step: the number of steps done.
        total: the number of steps that the configuration asks for.
        already_finished: whether there was nothing left to do.
        best_step: the step of the best checkpoint, if any epoch was finished.
        best: the scores at that step.
        stopped_early: whether it ended before, since the evaluations became no better.
        signal: what asked this process to stop, if anything did.
    """

    step: int
    total: int
    already_finished: bool
    best_step: int | None
    best: Scalars
    stopped_early: bool = False
    signal: Signals | None = None

    @property
    def is_done(self) -> bool:
        """Whether the run ended by itself."""
        return self.step == self.total or self.stopped_early


def train(config: ConfigDict, workdir: Path, command: str = "") -> TrainResult:
    """Trains from the last checkpoint, if any, to the last epoch or until a signal asks to stop.

    Args:
        config: as `config.read` gives it.
        workdir: the directory of the run; created if there is none.
        command: what the process was started with, for the card of the run.

    Raises:
        InputError: if something does not fit, and then nothing has been written; or if the loss is
            no longer finite.
    """
    # Everything is checked before anything is written.
    saved = check_workdir(workdir, config)
    run = make_run(config)
    if jax.process_index() == 0:
        for line in set_damaged_aside(workdir):
            print(line, flush=True)
    any_process(False)  # the others wait for it
    step = latest_step(workdir) or 0
    _check_epochs(run, workdir, step)
    already_finished = step == run.total_steps or _is_stale(run, history.read(workdir, step))
    news = _news(run, saved)
    if not already_finished:
        run.load_data()

    signal = None
    with contextlib.ExitStack() as stack:
        if not already_finished:
            write_config(workdir, config)
            if jax.process_index() == 0:
                stack.enter_context(one_writer(workdir))
        # What is done may lie on a disk that can only be read.
        checkpoints = _checkpoints(run, workdir, read_only=already_finished)
        stack.enter_context(contextlib.closing(checkpoints))
        if not already_finished:
            step, signal = _train(run, workdir, checkpoints, news, command)
        elif not (workdir / card.FILE_NAME).exists():  # a run of an older version
            with contextlib.suppress(OSError):
                card.write(workdir, run, step, history.read(workdir, step))
        best = checkpoints.best
        scores = {} if best is None else checkpoints.metrics(best)
        early = step < run.total_steps and _is_stale(run, history.read(workdir, step))
        return TrainResult(step, run.total_steps, already_finished, best, scores, early, signal)


def _checkpoints(run: Run, workdir: Path, *, read_only: bool) -> Checkpoints:
    return Checkpoints(
        workdir,
        read_only=read_only,
        best_metric=run.task.best_metric,
        keep_every_steps=run.config.keep_every_epochs * run.steps_per_epoch,
    )


def _is_stale(run: Run, lines: Sequence[history.Line]) -> bool:
    """Returns whether a run is to end early; all processes must call this."""
    patience = run.config.early_stopping_epochs
    return patience > 0 and any_process(history.is_stale(lines, run.task.best_metric, patience))


def _check_epochs(run: Run, workdir: Path, step: int) -> None:
    """Raises InputError if more steps are done than the configuration asks for."""
    if step > run.total_steps:
        raise InputError(
            f"{workdir} holds {step} steps, and config.epochs, {run.config.epochs}, are "
            f"{run.total_steps}: raise it, or choose another --workdir"
        )


def _news(run: Run, saved: ConfigDict | None) -> list[str]:
    """Takes initial values from another model, if asked to; returns lines to be printed.

    Args:
        run: the run, whose state may be replaced.
        saved: the configuration of its checkpoints, if there are any.
    """
    epochs = run.config.epochs
    if saved is None:
        return [initialize(run)] if run.config.init_from else []
    if saved.epochs != epochs:
        return [
            f"{epochs} epochs instead of {saved.epochs}: the learning rate goes on as in a run of "
            f"{epochs}"
        ]
    return []


def _train(
    run: Run, workdir: Path, checkpoints: Checkpoints, news: Sequence[str], command: str
) -> tuple[int, Signals | None]:
    """Trains from the last checkpoint, if any; returns the step at which it stopped, and why."""
    config, first_process = run.config, jax.process_index() == 0

    # Restore.
    batches, start = run.train_batches(), checkpoints.latest or 0
    if start:
        batches.set_state(run.restore(checkpoints, start))

    # Compile: nothing happens before the first call.
    train_step = make_train_step(run.task, run.model_def, run.tx, run.schedule)
    train_step = run.parallel.compile(train_step, donate=True)
    evaluate = make_evaluate(run)

    logs = _make_logs(run, workdir, start)
    trace = Trace(workdir, enabled=first_process and config.profile)
    meter = Meter(config.batch_size, run.task.unit_of_speed)
    step = start
    with logs, trace, StopSignals() as signals:
        for line in (_describe_run(run, start), *news):
            logs.info(line)
        _log_baselines(run, logs)
        card.write(workdir, run, step, logs.lines, command)

        # Nothing in the loop waits for the devices, except where the log and checkpoints need it.
        while step < run.total_steps:
            run.state, metrics = train_step(run.state, run.parallel.shard_batch(next(batches)))
            step += 1
            meter.add(metrics)
            trace.step(step - start, metrics)
            if step == start + 1:
                jax.block_until_ready(metrics)
                logs.first_step_done()
                meter.reset_timer()
            logs.step()

            ends_epoch = step % run.steps_per_epoch == 0
            logs_now = ends_epoch or _is_multiple(step, config.log_every_steps)
            # Several processes exchange whether to stop, which takes time, only when they log.
            stops = (logs_now or jax.process_count() == 1) and any_process(bool(signals.number))
            saves = ends_epoch or stops or _is_multiple(step, config.checkpoint_every_steps)
            scores = None
            if logs_now or saves:
                means = meter.read()
                _check_finite(means, step, checkpoints)
                logs.log_train(step, means)
            if ends_epoch:
                scores = evaluate()
                logs.log_eval(step, scores, meter.read_epoch())
                # Before the checkpoint: after a kill in between, this step is trained again.
                if first_process and checkpoints.is_best(scores):
                    run.save_model(workdir, step)
            if saves:
                _check_state(run, step, checkpoints)
                run.save(checkpoints, step, batches, scores)
                card.write(workdir, run, step, logs.lines, command)
                meter.reset_timer()
            if stops or (ends_epoch and _is_stale(run, logs.lines)):
                break
    return step, signals.number


def _make_logs(run: Run, workdir: Path, start: int) -> Logs:
    """Returns the logs of a run that begins at step `start`; only one process writes."""
    return Logs(
        workdir,
        step=start,
        total=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        enabled=jax.process_index() == 0,
        unit=run.task.unit_of_speed,
    )


def _describe_run(run: Run, start: int) -> str:
    """Returns the first line of the log: data, model and devices."""
    config, data = run.config, run.train_data
    frozen = f" and {run.num_frozen:,} frozen" if config.freeze else ""
    return (
        f"{data.name}: {len(data):,} {run.task.unit}, {config.epochs} epochs of "
        f"{run.steps_per_epoch} steps; {config.model.name} {config.model.variant}: "
        f"{run.num_parameters:,} parameters{frozen}; {jax.device_count()} × "
        f"{jax.devices()[0].device_kind}, {config.parallel}; "
        + (f"going on from step {start}" if start else "compiling takes a while")
    )


def _log_baselines(run: Run, logs: Logs) -> None:
    """Logs the losses that need no model, if the task has any."""
    baselines = run.task.baselines(run.train_data, run.eval_data)
    if baselines:
        named = "  ".join(f"{name} {loss:.4f}" for name, loss in baselines.items())
        logs.info(f"eval loss without a model: {named}")


def _is_multiple(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0


def _check_finite(means: Scalars, step: int, checkpoints: Checkpoints) -> None:
    """Raises InputError if the loss is not finite, before a checkpoint is saved."""
    if not math.isfinite(means["loss"]):
        _diverged(f"the loss is {means['loss']}", step, checkpoints)


def _check_state(run: Run, step: int, checkpoints: Checkpoints) -> None:
    """Raises InputError if what is to be saved is not finite: the loss is that before the step."""
    for name, tree in zip(run.state._fields, run.state, strict=True):
        for leaf in map(np.asarray, jax.tree.leaves(jax.device_get(tree))):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all():
                _diverged(f"{STATE_NAMES.get(name, name)} are not finite", step, checkpoints)


def _diverged(what: str, step: int, checkpoints: Checkpoints) -> NoReturn:
    last = checkpoints.latest
    raise InputError(
        f"{what} at step {step}: lower config.optimizer.learning_rate; "
        + (f"the last checkpoint is of step {last}" if last else "there is no checkpoint yet")
    )
