"""Trains a model from its configuration to its last checkpoint.

result = train(config.read("experiments/digits.py"), Path("runs/digits"))
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import NamedTuple

import jax

from terminator_jax.errors import InputError
from terminator_jax.ops.platform import only
from terminator_jax.training import card, history, provenance
from terminator_jax.training.checkpoint import (
    Checkpoints,
    check_workdir,
    latest_step,
    set_damaged_aside,
    write_config,
)
from terminator_jax.training.config import ConfigDict
from terminator_jax.training.diagnostics import make_diagnose
from terminator_jax.training.distributed import (
    any_process,
    compare_run,
    has_joined,
    stop_together,
    wait_for_all,
)
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.initial import initialize
from terminator_jax.training.interrupt import StopSignals
from terminator_jax.training.lock import one_writer
from terminator_jax.training.logs import Logs
from terminator_jax.training.metrics import Scalars
from terminator_jax.training.recorder import Recorder
from terminator_jax.training.setup import Run, make_run
from terminator_jax.training.step import make_train_step
from terminator_jax.training.trace import Trace


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        step: the number of steps done.
        total: the number of steps that the configuration asks for.
        already_finished: whether there was nothing left to do.
        best_step: the step of the best checkpoint, if any epoch was finished.
        best: the scores at that step.
        best_metric: which of them decides.
        stopped_early: whether it ended before, since the evaluations became no better.
        signal: what asked this process to stop, if anything did.
    """

    step: int
    total: int
    already_finished: bool
    best_step: int | None
    best: Scalars
    best_metric: str
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
        InputError: if something does not fit, and then nothing has been written, but damaged
            checkpoints may have been moved away; or if the loss is no longer finite.
    """
    known = provenance.read(workdir)
    saved = check_workdir(workdir, config, known)
    if saved:
        resumed = provenance.as_trained(config, saved, known)
        run = make_run(resumed, classes=known.classes if known else ())
        provenance.check(run.config, run.train_data, known)
    else:
        run, known = make_run(config), None
    if jax.process_index() == 0:
        for line in set_damaged_aside(workdir):
            print(line, flush=True)
    wait_for_all()
    step = latest_step(workdir) or 0
    compare_run(run.train_data, run.eval_data, step)
    _check_epochs(run, workdir, step)
    already_finished = step == run.total_steps or _is_stale(run, history.read(workdir, step))
    messages = _initialize(run, saved if step else None)
    if not already_finished:
        run.load_data()

    with contextlib.ExitStack() as stack:
        # Until the last checkpoint is whole, which is written in the background.
        signals = stack.enter_context(StopSignals(forward=has_joined()))
        # Traced for this platform alone, the digits start in 6.8 s and not in 9.3 s, once JAX's
        # cache has the program.
        stack.enter_context(only(jax.devices()[0].platform))
        if not already_finished:
            if jax.process_index() == 0:
                stack.enter_context(one_writer(workdir))
                _check_alone(workdir, step)
                write_config(workdir, config)
                provenance.write(workdir, run.config, run.train_data, known)
            wait_for_all()
        # What is done may lie on a disk that can only be read.
        checkpoints = _checkpoints(run, workdir, read_only=already_finished)
        stack.enter_context(contextlib.closing(checkpoints))
        if not already_finished:
            step = _run_steps(run, workdir, checkpoints, messages, command, signals)
        elif not (workdir / card.FILE_NAME).exists():  # a run of an older version
            with contextlib.suppress(OSError):
                card.write(workdir, run, step, history.read(workdir, step))
        best = checkpoints.best
        return TrainResult(
            step=step,
            total=run.total_steps,
            already_finished=already_finished,
            best_step=best,
            best={} if best is None else checkpoints.metrics(best),
            best_metric=run.task.best_metric,
            stopped_early=step < run.total_steps and _is_stale(run, history.read(workdir, step)),
            signal=signals.number,
        )


def _check_alone(workdir: Path, step: int) -> None:
    """Raises InputError if another process has trained here before this one had the lock."""
    if (latest_step(workdir) or 0) != step:
        raise InputError(
            f"another process has trained in {workdir} meanwhile: start again to go on from its "
            "last checkpoint"
        )


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


def _initialize(run: Run, saved: ConfigDict | None) -> list[str]:
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


def _run_steps(
    run: Run, workdir: Path, checkpoints: Checkpoints, messages: Sequence[str], command: str,
    signals: StopSignals,
) -> int:  # fmt: skip
    """Trains from the last checkpoint, if any; returns the step at which it stopped."""
    config = run.config
    batches, start = run.train_batches(), checkpoints.latest or 0
    if start:
        batches.set_state(run.restore(checkpoints, start))

    # Nothing compiles before the first call.
    train_step = make_train_step(run.task, run.model_def, run.tx, run.schedule)
    train_step = run.parallel.compile(train_step, donate=True)
    evaluate, diagnose = make_evaluate(run), make_diagnose(run)
    recorder = Recorder(run, workdir, checkpoints, _make_logs(run, workdir, start), command)
    trace = Trace(workdir, enabled=jax.process_index() == 0 and config.profile)
    step = start
    with recorder.logs as logs, trace:
        for line in (_describe_run(run, start), *messages):
            logs.info(line)
        _log_baselines(run, logs)
        recorder.write_card(step)

        # Nothing in the loop waits for the devices, except where the log and checkpoints need it.
        while step < run.total_steps:
            batch = next(batches)
            run.state, metrics = train_step(run.state, run.parallel.shard_batch(batch))
            step += 1
            recorder.add(metrics, first=step == start + 1)
            trace.step(step - start, metrics)

            ends_epoch = step % run.steps_per_epoch == 0
            logs_now = ends_epoch or _is_multiple(step, config.log_every_steps)
            stops = stop_together(bool(signals.number), step)
            saves = ends_epoch or stops or _is_multiple(step, config.checkpoint_every_steps)
            if logs_now or saves:
                recorder.log_train(step)
            if _is_multiple(step, config.diagnostics_every_steps):
                recorder.log_diagnostics(step, diagnose(batch))
            if saves:
                recorder.check_state(step)
            scores = evaluate() if ends_epoch else None
            if scores:
                recorder.log_eval(step, scores)
            if saves:
                recorder.save(step, batches, scores)
            if stops or (ends_epoch and _is_stale(run, logs.lines)):
                break
    return step


def _make_logs(run: Run, workdir: Path, start: int) -> Logs:
    """Returns the logs of a run that begins at step `start`; only one process writes."""
    return Logs(
        workdir,
        step=start,
        total=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        enabled=jax.process_index() == 0,
        unit=run.task.unit_of_speed,
        shown=run.task.metrics,
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
    baselines = run.task.baselines(run.eval_data)
    if baselines:
        named = "  ".join(f"{name} {loss:.4f}" for name, loss in baselines.items())
        logs.info(f"eval loss without a model: {named}")


def _is_multiple(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0
