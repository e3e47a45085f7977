"""Logs a run: JSON lines, TensorBoard events, and a bar or lines on the terminal.

workdir/log.jsonl          one object a line: kind ("train", "eval" or "diagnostics"), step, epoch,
                           metrics
workdir/events.out.…       the same for TensorBoard
"""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

from terminator_jax.errors import cannot_write
from terminator_jax.training import history
from terminator_jax.training.metrics import Scalars
from terminator_jax.training.paths import replace_text

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}  {remaining} left"


class Logs:
    """Writes the metrics of a run; a context manager.

    Args:
        workdir: the directory of the run, which exists.
        step: the step that the run resumes from; what was logged after it is dropped.
        total: the last step of the run.
        steps_per_epoch: steps in an epoch.
        enabled: whether this process writes; only one of several does.
        unit: what a step's examples are called.
        shown: the metrics that the bar shows of training steps.

    Attributes:
        lines: of the log, also those of earlier processes; none if this one does not write.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        total: int,
        steps_per_epoch: int,
        enabled: bool = True,
        unit: str = "images",
        shown: Sequence[str] = ("loss",),
    ):
        self._shown = shown
        self._unit, self._workdir, self._start = unit, workdir, step
        self._enabled, self._steps_per_epoch, self._total = enabled, steps_per_epoch, total
        self._bar, self._writer, self.lines = None, None, []
        if not enabled:
            return
        self.lines = history.read(workdir, step)
        self._file = _rewritten(workdir / "log.jsonl", self.lines)
        if sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=step, unit="step", file=sys.stdout, dynamic_ncols=True,
                smoothing=0.1, desc="compiling", bar_format=BAR,
            )  # fmt: skip

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._enabled:
            return
        if self._bar:
            self._bar.close()
        with contextlib.suppress(OSError):  # of a full disk, which was said when it was written to
            self._file.close()
            if self._writer:
                self._writer.close()

    def info(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._enabled:
            (self._bar.write if self._bar else print)(line, file=sys.stdout)
            sys.stdout.flush()

    def step(self) -> None:
        """Advances the bar."""
        if self._bar:
            self._bar.update()

    def first_step_done(self) -> None:
        """Opens the event file, and excludes the time until now from the bar's estimate."""
        if self._enabled:
            self._events()
        if self._bar:
            self._bar.unpause()

    def log_train(self, step: int, means: Scalars) -> None:
        """Writes the means of the training steps since the last call."""
        self._write("train", step, means)
        if self._bar:
            shown = "".join(f"{name} {means[name]:.4f}  " for name in self._shown if name in means)
            self._bar.set_description_str(f"epoch {self._epoch(step)}", refresh=False)
            self._bar.set_postfix_str(shown + self._speed(means))

    def log_diagnostics(self, step: int, found: Scalars) -> None:
        """Writes what `diagnostics.make_diagnose` found."""
        self._write("diagnostics", step, found)

    def log_eval(self, step: int, scores: Scalars, means: Scalars) -> None:
        """Writes the scores of an evaluation, and prints the epoch's line."""
        self._write("eval", step, scores)
        epochs = self._total // self._steps_per_epoch
        self.info(
            f"epoch {self._epoch(step)}/{epochs}  train loss {means['loss']:.4f}  "
            + "".join(f"eval {name} {scores[name]:.4f}  " for name in _metric_names(scores))
            + self._speed(means)
        )

    def _events(self) -> Any:
        """Returns TensorBoard's writer; opened late, because it imports PyTorch where that is."""
        if self._writer is None:
            import tensorboardX

            self._writer = tensorboardX.SummaryWriter(
                str(self._workdir), purge_step=self._start + 1
            )
        return self._writer

    def _speed(self, means: Scalars) -> str:
        return f"{means[f'{self._unit}_per_second']:.0f} {self._unit}/s"

    def _epoch(self, step: int) -> int:
        """Returns the epoch, from 1, of a step, from 1."""
        return (step - 1) // self._steps_per_epoch + 1

    def _write(self, kind: str, step: int, metrics: Scalars) -> None:
        if not self._enabled:
            return
        line = {"kind": kind, "step": step, "epoch": self._epoch(step), **metrics}
        self.lines.append(line)
        try:
            self._file.write(_to_json(line) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._events().add_scalar(f"{kind}/{name}", value, step)
            self._events().flush()
        except OSError as error:
            raise cannot_write(f"the log in {self._workdir}", error) from error


def _metric_names(scores: Scalars) -> list[str]:
    """Returns the names of an evaluation's metrics, the loss first."""
    return sorted(scores.keys() - {"count"}, key=lambda name: (name != "loss", name))


def _rewritten(path: Path, lines: Sequence[history.Line]) -> Any:
    """Opens the log for more lines after these, which leave out what was logged too early."""
    replace_text(path, "".join(f"{_to_json(line)}\n" for line in lines))
    return path.open("a", encoding="utf-8")


def _to_json(line: history.Line) -> str:
    """Returns a line of the log. JSON has no NaN and no infinity: they become null."""
    return json.dumps({name: value if _is_valid(value) else None for name, value in line.items()})


def _is_valid(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
