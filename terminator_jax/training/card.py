"""Writes the card of a run: `README.md` with its command, data, results and configuration.

workdir/README.md     written again at the end of each epoch, and when a run stops
workdir/curve.svg     the course of its metrics, shown in the card, where matplotlib is installed
"""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import jax

import terminator_jax
from terminator_jax import loading
from terminator_jax.training import config as configs
from terminator_jax.training import curve, history
from terminator_jax.training.history import Line
from terminator_jax.training.paths import replace_text
from terminator_jax.training.setup import Run

FILE_NAME = "README.md"

# The first line of every card: a README.md without it is somebody else's.
MARK = "<!-- Training writes this file again: put notes elsewhere. -->"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write(workdir: Path, run: Run, step: int, lines: Sequence[Line], command: str = "") -> None:
    """Writes the card and the curve, in the first of several processes.

    A `README.md` that is not a card stays as it is.

    Args:
        workdir: the directory of the run.
        run: the run.
        step: the number of steps done.
        lines: of its log.
        command: what it was started with; "" if it was not started by a command.
    """
    file = workdir / FILE_NAME
    foreign = file.exists() and not file.read_bytes().startswith(MARK.encode())
    if foreign or jax.process_index() != 0:
        return
    drawn = curve.panels(lines)
    figure = curve.svg(drawn) if drawn else ""
    if figure:
        replace_text(workdir / "curve.svg", figure)
    sections = [
        f"{MARK}\n# {workdir.resolve().name}",
        _summary(run, step, lines),
        "![loss and metrics by epoch](curve.svg)" if figure else "",
        f"## Command\n\n    {command}" if command else "",
        _data(run),
        _model(run, workdir, bool(drawn)),
        _configuration(run),
        _versions(),
    ]
    replace_text(file, "\n\n".join(filter(None, sections)) + "\n")


def _summary(run: Run, step: int, lines: Sequence[Line]) -> str:
    """Returns what was trained, how far it is, and the best and the last evaluation."""
    metric, config = run.task.best_metric, run.config
    state = f"Done: {step} steps, {config.epochs} epochs."
    if history.is_stale(lines, metric, config.early_stopping_epochs):
        count = history.without_improvement(lines, metric)
        state = f"Ended early at step {step}: {count} evaluations without a better `{metric}`."
    elif step < run.total_steps:
        state = f"{step} of {run.total_steps} steps are done; the same command goes on."
    found = history.evaluations(lines)
    if not found:
        return f"{state} No evaluation yet."
    names = [name for name in found[-1] if name not in curve.NO_METRICS]
    rows = [
        (title, line["epoch"], line["step"], *(f"{line.get(name, math.nan):.4f}" for name in names))
        for title, line in (("best", history.best(lines, metric)), ("last", found[-1]))
    ]
    count = found[-1].get("count", math.nan)
    unit = f"{count:.0f} {run.task.unit_of_evaluation} of {run.eval_data.name}"
    return (
        f"{state}\n\n## Results\nOn {unit}; the best is by `{metric}`.\n\n"
        f"{_table(('evaluation', 'epoch', 'step', *names), rows)}"
    )


def _data(run: Run) -> str:
    """Returns the splits and what they hold."""
    rows = [
        (use, data.name, f"{len(data):,} {run.task.unit}", " × ".join(map(str, shape)))
        for use, data in (("training", run.train_data), ("evaluation", run.eval_data))
        for shape in [getattr(data, "shape", run.config.data.grid)]
    ]
    classes = run.train_data.classes
    text = f"## Data\n{_table(('for', 'split', 'size', 'shape'), rows)}"
    shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
    return f"{text}\n\n{len(classes)} classes: {shown}." if classes else text


def _model(run: Run, workdir: Path, exists: bool) -> str:
    """Returns the model's size, and how to use it."""
    model, frozen = run.config.model, f" and {run.num_frozen:,} frozen" * bool(run.num_frozen)
    text = (
        f"## Model\n`{model.name}`, variant `{model.variant}`: {run.num_parameters:,} parameters "
        f"are trained{frozen}."
    )
    use = (
        f"The best one is in `{loading.FILE_NAME}`:\n\n"
        f'    loaded = terminator_jax.load_model("{workdir}")  # .model, .config, .classes'
    )
    return f"{text} {use}" if exists else text


def _configuration(run: Run) -> str:
    """Returns the fields that differ from the defaults, and all of them folded away."""
    rows = [
        (f"`{path}`", f"`{value}`", f"`{own}`") for path, value, own in configs.changes(run.config)
    ]
    return (
        f"## Configuration\n{_table(('field', 'value', 'default'), rows)}\n\n"
        "<details><summary>All fields</summary>\n\n"
        f"```json\n{configs.to_json(run.config)}```\n\n</details>"
    )


def _versions() -> str:
    """Returns the versions of what the last process ran with, and its devices."""
    rows = [
        ("terminator-jax", terminator_jax.__version__),
        ("Python", platform.python_version()),
        *((name, importlib.metadata.version(name)) for name in PACKAGES),
        ("devices", f"{jax.device_count()} × {jax.devices()[0].device_kind}"),
    ]
    return f"## Versions\n{_table(('', 'of the last process'), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    escaped = ([str(cell).replace("|", "\\|") for cell in row] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
