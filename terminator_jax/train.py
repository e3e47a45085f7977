"""Trains a model. See `--help`."""

import signal
from collections.abc import Sequence
from pathlib import Path

from terminator_jax.training import cli

DESCRIPTION = """\
Trains a model, or resumes a run that was stopped.

    python -m terminator_jax.train --config=digits
    python -m terminator_jax.train --config=experiments/cifar10.py --config.epochs=20

An experiment is a Python file, or the bare name of one that comes with the package. Every field
of its configuration can be changed: --config.optimizer.learning_rate=0.002
--config.model.options.num_classes=5

Call the same command again to resume after Ctrl-C or a crash. SIGTERM and SIGHUP save like Ctrl-C,
and the exit code is then 0. Watch: tensorboard --logdir=runs

For several processes, start one on each host with the same flags and its own --process_id.
"""


def main(arguments: Sequence[str]) -> int:
    """Reads the flags, trains and prints where everything is; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_argument(
        "--config", required=True, metavar="EXPERIMENT", help="a configuration file, or its name"
    )
    parser.add_argument(
        "--workdir", help="the directory for checkpoints and logs (default: runs/EXPERIMENT)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    parser.add_argument("--num_processes", type=int, default=1, help="number of processes")
    parser.add_argument("--process_id", type=int, default=0, help="index of this process, from 0")
    flags, overrides = parser.parse_known_args(arguments)
    workdir = cli.run_directory(flags)

    # What follows imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax.training import config

    configuration = config.read(flags.config, overrides)
    from terminator_jax.training import compilation_cache, loop, parallel

    if configuration.compilation_cache:
        compilation_cache.enable()
    if flags.num_processes > 1 or flags.coordinator:
        parallel.initialize_distributed(flags.coordinator, flags.num_processes, flags.process_id)
    if flags.workdir is None and flags.process_id == 0:
        print(f"checkpoints and logs go to {workdir} (--workdir sets another directory)")
    try:
        result = loop.train(configuration, workdir, cli.same_command("terminator_jax.train"))
    except Exception as error:
        error.add_note(f"the log is {workdir / 'log.jsonl'}")
        raise
    if flags.process_id == 0:
        _report(result, workdir)
    # A scheduler starts a process again that it stopped and that ended well.
    asked = result.signal in (signal.SIGTERM, signal.SIGHUP)
    return 0 if result.is_done or asked else cli.INTERRUPTED


def _report(result, workdir: Path) -> None:
    if not result.is_done:
        print(f"stopped and saved at step {result.step} of {result.total}; to go on:")
        print(f"    {cli.same_command('terminator_jax.train')}")
        return
    state = "was done already" if result.already_finished else "done"
    early = f" of {result.total}, as --config.early_stopping_epochs says" * result.stopped_early
    metric, scores = result.best_metric, result.best
    others = ", ".join(
        f"{name} {value:.4f}"
        for name, value in scores.items()
        if name not in (metric, "count") and name.startswith("ema_") == metric.startswith("ema_")
    )
    print(
        f"{state}: {result.step} steps{early}; best eval {metric} {scores[metric]:.4f} ({others}) "
        f"at step {result.best_step}"
    )
    print(f"checkpoints: {workdir / 'checkpoints'}   logs: {workdir / 'log.jsonl'}")


if __name__ == "__main__":
    cli.run(main)
