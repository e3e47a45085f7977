"""Writes what a run gives: its log, its checkpoints and its card; stops what is not finite."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.errors import InputError, cannot_write
from terminator_jax.training import card, diagnostics
from terminator_jax.training.checkpoint import Checkpoints
from terminator_jax.training.logs import Logs
from terminator_jax.training.meter import Meter
from terminator_jax.training.metrics import Scalars
from terminator_jax.training.setup import Run

# What is in the state, in the words of a message.
STATE_NAMES = {
    "params": "the parameters",
    "model_state": "the running averages",
    "opt_state": "the averages of the optimizer",
}


class Recorder:
    """Writes what a run gives.

    Args:
        run: the run.
        workdir: its directory.
        checkpoints: those of the directory.
        logs: those of the directory.
        command: what the run was started with, for its card.
    """

    def __init__(
        self, run: Run, workdir: Path, checkpoints: Checkpoints, logs: Logs, command: str = ""
    ):
        self._run, self._workdir, self._checkpoints = run, workdir, checkpoints
        self.logs, self._command = logs, command
        self._meter = Meter(run.config.batch_size, run.task.unit_of_speed)
        self._skipped = self._skipped_in_a_row = 0

    def add(self, metrics: dict[str, jax.Array], *, first: bool) -> None:
        """Takes the metrics of a step; waits only for the first, which is not timed."""
        self._meter.add(metrics)
        if first:
            jax.block_until_ready(metrics)
            self.logs.first_step_done()
            self._meter.reset_timer()
        self.logs.step()

    def log_train(self, step: int) -> None:
        """Logs the means since the last call.

        Raises:
            InputError: if a loss or gradient was not finite, unless such steps are to be skipped.
        """
        means = self._meter.read()
        count = len(self._meter.steps)
        for number, metrics in enumerate(self._meter.steps, start=step - count + 1):
            if metrics["skipped"]:
                self._skip(number, metrics)
            else:
                self._skipped_in_a_row = 0
        self.logs.log_train(step, means | {"skipped": self._skipped})

    def log_diagnostics(self, step: int, found: Scalars) -> None:
        """Logs what `make_diagnose` found."""
        self.logs.log_diagnostics(step, found)
        self._meter.reset_timer()

    def log_eval(self, step: int, scores: Scalars) -> None:
        """Logs an evaluation; writes the model alone if it is the best until now.

        Raises:
            InputError: if a score is not finite.
        """
        self.logs.log_eval(step, scores, self._meter.read_epoch())
        for name, value in scores.items():
            if not math.isfinite(value):
                self._stop(f"the evaluation's {name} is {value} at step {step}")
        # Before the checkpoint: after a kill in between, this step is trained again.
        if jax.process_index() == 0 and self._checkpoints.is_best(scores):
            with self._written():
                self._run.save_model(self._workdir, step)

    def check_state(self, step: int) -> None:
        """Raises InputError if what is to be saved is not finite.

        The loss of a step does not show that: it is the one before the update.
        """
        for name, tree in zip(self._run.state._fields, self._run.state, strict=True):
            if not all(map(_is_finite, jax.tree.leaves(jax.device_get(tree)))):
                self._stop(f"{STATE_NAMES.get(name, name)} are not finite at step {step}")

    def save(self, step: int, batches: grain.DatasetIterator, scores: Scalars | None) -> None:
        """Begins to write a checkpoint, and writes the card."""
        self._run.save(self._checkpoints, step, batches, scores)
        self.write_card(step)
        self._meter.reset_timer()

    def write_card(self, step: int) -> None:
        """Writes the card of the run."""
        with self._written():
            card.write(self._workdir, self._run, step, self.logs.lines, self._command)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._workdir, error) from error

    def _skip(self, step: int, metrics: Scalars) -> None:
        what = "loss" if not math.isfinite(metrics["loss"]) else "gradient_norm"
        problem = f"the {what.replace('_norm', '')} of step {step} is {metrics[what]}"
        self._skipped, self._skipped_in_a_row = self._skipped + 1, self._skipped_in_a_row + 1
        if self._run.config.on_nonfinite == "stop":
            file = diagnostics.write_report(self._run, self._workdir, step, metrics)
            self._stop(f"{problem}: {file} says more")
        if self._skipped_in_a_row >= self._run.steps_per_epoch:
            self._stop(f"{problem}, and no step of the epoch before was better")
        self.logs.info(f"{problem}: the step was left out, {self._skipped} until now")

    def _stop(self, problem: str) -> NoReturn:
        last = self._checkpoints.latest
        raise InputError(
            f"{problem}: lower config.optimizer.learning_rate; "
            + (f"the last checkpoint is of step {last}" if last else "there is no checkpoint yet")
        )


def _is_finite(leaf: jax.typing.ArrayLike) -> bool:
    leaf = np.asarray(leaf)
    return not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(np.isfinite(leaf).all())
