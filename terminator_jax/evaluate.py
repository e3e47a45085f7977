"""Evaluates a checkpoint. See `--help`."""

import json
import sys
from collections.abc import Sequence

from terminator_jax.errors import InputError
from terminator_jax.training import cli, report

DESCRIPTION = """\
Evaluates a checkpoint of a run, the best one unless told otherwise.

Prints accuracy, loss (the mean negative log-likelihood) and, for classifiers, the top-5 accuracy,
the expected calibration error, the accuracy of each class and the confusion matrix.

    python -m terminator_jax.evaluate --config=digits
    python -m terminator_jax.evaluate --workdir=runs/digits --step=440
    python -m terminator_jax.evaluate --workdir=runs/digits --size=16
    python -m terminator_jax.evaluate --workdir=runs/digits --statistics=batch
    python -m terminator_jax.evaluate --config=digits --config.data.eval_split=train
"""


def main(arguments: Sequence[str]) -> int:
    """Reads the flags, evaluates and prints the result; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_run()
    parser.add_step()
    parser.add_argument("--size", default=0, type=int, help="pixels per side (default: as trained)")
    parser.add_argument(
        "--statistics", default="running", choices=("running", "batch"),
        help="which statistics the model normalizes with: the averages of training, or those of "
        "each batch, as the published results do (default: running)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all scores as one JSON object")
    parser.add_argument(
        "--calibrate", action="store_true",
        help="compute the averages anew, from the training images, for a run of an older version; "
        "they are kept in model.safetensors, unless --step, --size or --config.… is given",
    )  # fmt: skip
    flags, overrides = parser.parse_known_args(arguments)
    workdir = cli.run_directory(flags)
    wanted = cli.checkpoint_step(flags)
    if flags.size < 0:
        raise InputError(f"--size is {flags.size}, and must be a number of pixels")
    # Imports JAX, which --help need not wait for.
    from terminator_jax.training import evaluation

    found = evaluation.evaluate_checkpoint(
        workdir, wanted, overrides, flags.size or None,
        statistics=flags.statistics, calibrate=flags.calibrate,
        bar=sys.stderr.isatty(),
    )  # fmt: skip
    if flags.json:
        scores = {"step": found.step, "statistics": flags.statistics, **found.scores}
        print(json.dumps(scores | {"baselines": found.baselines} if found.baselines else scores))
    else:
        _print(found)
    return 0


def _print(found) -> None:
    """Prints an `Evaluation` for people."""
    scores = found.scores
    metrics = "".join(f"{name} {scores[name]:.4f}  " for name in found.metrics)
    print(f"step {found.step}: {metrics}{scores['count']:.0f} {found.unit}")
    averages = [
        f"{name} {scores[f'ema_{name}']:.4f}" for name in found.metrics if f"ema_{name}" in scores
    ]
    if averages:
        print("averages: " + "  ".join(averages))
    if "confusion" in scores:
        described = f"of the {scores['described']}: " if "described" in scores else ""
        print(
            f"{described}top-5 accuracy {scores['top5_accuracy']:.4f}  "
            f"expected calibration error {scores['calibration_error']:.4f}\n"
        )
        print("confusion matrix (rows: labels, columns: predictions)")
        print(report.table(scores))
    if found.baselines:
        named = "  ".join(f"{name} {loss:.4f}" for name, loss in found.baselines.items())
        print(f"loss without a model: {named}")


if __name__ == "__main__":
    cli.run(main)
