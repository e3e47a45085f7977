"""The evaluation of a state, and of a checkpoint."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from terminator_jax import loading
from terminator_jax.data import pipeline
from terminator_jax.data.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training.checkpoint import Checkpoints, read_config
from terminator_jax.training.examples import EXAMPLES, open_pictures
from terminator_jax.training.metrics import Scalars, totals
from terminator_jax.training.parallel import own_process
from terminator_jax.training.setup import Run, make_run
from terminator_jax.training.state import TrainState, pack, split
from terminator_jax.training.step import make_eval_step
from terminator_jax.training.task import Task, make_task

# What a checkpoint cannot be evaluated with unless it was trained with it.
FIXED = ("model.", "optimizer.")


class Evaluation(NamedTuple):
    """What an evaluation of a checkpoint found.

    Attributes:
        step: of the checkpoint.
        scores: what `make_evaluate` gives.
        counted: what `scores["count"]` counts.
        baselines: losses by name that need no model.
    """

    step: int
    scores: Scalars
    counted: str
    baselines: Scalars


def make_evaluate(run: Run, examples: pipeline.Examples) -> Callable[[TrainState], Scalars]:
    """A function of the state to `loss` (cross-entropy), `accuracy` and `count`.

    Every example counts once. Batches are in order and of one size, because a prediction depends on
    its batch: another `config.eval_batch_size` gives slightly different numbers.
    """
    eval_step = run.mode.compile(make_eval_step(run.task, run.structure))

    def evaluate(state: TrainState) -> Scalars:
        batches = pipeline.eval_batches(examples, run.config.eval_batch_size, process=own_process())
        return totals(eval_step(state, run.mode.place(batch)) for batch in batches)

    return evaluate


def evaluate_checkpoint(
    workdir: Path,
    step: int | None = None,
    overrides: Sequence[str] = (),
    size: int | None = None,
) -> Evaluation:
    """Evaluates a checkpoint with the configuration that is kept beside it.

    Args:
        workdir: the directory of the run.
        step: which checkpoint; None for the best.
        overrides: flags such as `--config.data.eval_split=train`.
        size: pixels per side of pictures and model, if not those that it was trained with.

    Raises:
        InputError: if there is no such run or checkpoint, or a flag is wrong.
    """
    kept = read_config(workdir)
    config = configs.override(kept.copy_and_resolve_references(), overrides)
    for difference in configs.differences(kept, config):
        if difference.startswith(FIXED):
            raise InputError(f"the checkpoints were made with another config.{difference}")
    checkpoints, chosen = open_checkpoint(workdir, step, make_task(config))
    run = make_run(config)
    state, _ = checkpoints.restore(chosen, run.like, run.mode.replicated)
    state = run.packed(state)
    if step is None and not (workdir / loading.FILE_NAME).exists():
        with contextlib.suppress(OSError):  # a run that can only be read is evaluated all the same
            run._replace(config=kept).save_model(workdir, state, chosen)
    if size is not None:
        run, state = _resized(run, state, size)
    scores = make_evaluate(run, run.read(run.eval))(state)
    baselines = run.source.baselines(run.config, run.train, run.eval)
    return Evaluation(chosen, scores, run.source.counted, baselines)


def _resized(run: Run, state: TrainState, size: int) -> tuple[Run, TrainState]:
    """Model and pictures with `size` pixels per side; says on stderr what changes in the model."""
    model = run.structure.merge(state.params, state.other)
    if run.config.data.sequence or not hasattr(model, "resized"):
        raise InputError("--size is for models of pictures that have a `resized`: leave it away")
    model, changes = model.resized((size, size))
    print(*changes, sep="\n", file=sys.stderr)
    structure, params, other = split(model)
    task = dataclasses.replace(run.task, model_config=model.config)
    config = run.config.copy_and_resolve_references()
    config.data.resize = size
    pictures = open_pictures(config, config.data.eval_split)
    run = run._replace(config=config, task=task, structure=structure, eval=pictures)
    return run, state._replace(params=pack(params), other=other)


def open_checkpoint(workdir: Path, step: int | None, task: Task) -> tuple[Checkpoints, int]:
    """The checkpoints of a run and which of them is meant; None for the best.

    Raises:
        InputError: if there is no such checkpoint.
    """
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir} holds no checkpoints yet")
    quality = EXAMPLES[task.family.kind].quality
    checkpoints = Checkpoints(workdir, read_only=True, quality=quality)
    return checkpoints, _choose(checkpoints, workdir, step)


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
