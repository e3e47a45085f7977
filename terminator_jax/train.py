"""Trains a model. See `--help`."""

import argparse
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path

from terminator_jax.errors import InputError
from terminator_jax.training import cli, interrupt, lock, paths

DESCRIPTION = """\
Trains a model, or resumes a run that was stopped.

    python -m terminator_jax.train --config=digits
    python -m terminator_jax.train --config=experiments/cifar10.py --config.epochs=20

An experiment is a Python file, or else the bare name of one that comes with the package (listed
below). It sets fields of a configuration. All fields and their defaults are in default_config() of
terminator_jax/training/config.py, and each can be changed by a flag, as in
--config.optimizer.learning_rate=0.002 or --config.model.options.num_classes=5
--config=FILE.py:ARGUMENT calls get_config(ARGUMENT). --flagfile=FILE reads flags, one a line.

Call the same command again to resume after Ctrl-C or a crash. Watch: tensorboard --logdir=runs

Exit codes:
    0      done; or stopped and saved by SIGTERM, SIGHUP (a terminal that closes) or SIGUSR1
    130    stopped and saved by Ctrl-C; or ended at once by a second Ctrl-C or SIGTERM
    1      the machine failed, such as a full disk
    2      something in the command, the configuration or the data does not fit

Signals that are ignored when the command starts, as SIGHUP is after nohup, stay ignored.

For several processes, start the same command with --distributed in each: on a TPU pod, under SLURM
or MPI. By hand, give each --coordinator, --num_processes and its own --process_id. More:
docs/scaling.md
"""


def main(arguments: Sequence[str]) -> int:
    """Reads the flags, trains and prints where everything is; returns the exit code."""
    parser = cli.Parser(
        DESCRIPTION, "Experiments:\n" + textwrap.fill(", ".join(paths.experiments()))
    )
    parser.add_argument(
        "--config", required=True, metavar="EXPERIMENT", help="a configuration file, or its name"
    )
    parser.add_argument(
        "--workdir", help="the directory for checkpoints and logs (default: runs/EXPERIMENT)"
    )
    _add_processes(parser)
    flags, overrides = parser.parse_known_args(arguments)
    lock.check_system()
    workdir = cli.run_directory(flags)
    several = _check_processes(flags)

    # What follows imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax.training import config

    configuration = config.read(flags.config, overrides)
    import jax

    from terminator_jax.training import compilation_cache, distributed, loop

    if configuration.compilation_cache:
        compilation_cache.enable()
    if several:
        _join(flags, configuration)
    first = not several or jax.process_index() == 0
    if flags.workdir is None and first:
        print(f"checkpoints and logs go to {workdir} (--workdir sets another directory)")
    try:
        result = loop.train(configuration, workdir, cli.same_command("terminator_jax.train"))
    except Exception as error:
        if (log := workdir / "log.jsonl").exists():
            error.add_note(f"the log is {log}")
        raise
    asked = result.signal
    if several and not result.is_done:
        asked = distributed.signal_of_any(asked)
    if first:
        _report(result, workdir)
    # A scheduler starts a process again that it stopped and that ended well.
    ends_well = result.is_done or asked not in (None, signal.SIGINT)
    return 0 if ends_well else interrupt.INTERRUPTED


def _add_processes(parser: cli.Parser) -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="KIND",
        help="join the other processes, as JAX finds them: TPU pod, SLURM, Open MPI, Kubernetes; "
        "KIND names one of them, such as mpi4py, which JAX does not try by itself",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    parser.add_argument("--num_processes", type=int, help="number of processes")
    parser.add_argument("--process_id", type=int, help="index of this process, from 0")
    parser.add_argument(
        "--join_timeout",
        type=int,
        default=40,
        metavar="SECONDS",
        help="time in which all processes must have started (default: 40)",
    )


def _check_processes(flags: argparse.Namespace) -> bool:
    """Returns whether there are several processes.

    Raises:
        InputError: if the flags do not say which.
    """
    names = ("coordinator", "num_processes", "process_id")
    given = [f"--{name}" for name in names if getattr(flags, name) is not None]
    missing = [f"--{name}" for name in names if getattr(flags, name) is None]
    if flags.join_timeout < 1:
        raise InputError(f"--join_timeout is {flags.join_timeout}, and must be 1 or more")
    if flags.distributed and given:
        raise InputError(f"{given[0]} and --distributed exclude each other: leave one out")
    if given and missing:
        raise InputError(
            f"{given[0]} needs {' and '.join(missing)} too; or give --distributed alone"
        )
    if given:
        _check_addresses(flags.coordinator, flags.num_processes, flags.process_id)
    return bool(given or flags.distributed)


def _check_addresses(coordinator: str, num_processes: int, process_id: int) -> None:
    if num_processes < 1:
        raise InputError(f"--num_processes is {num_processes}, and must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process_id is {process_id}, and must be from 0 to {num_processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(f"--coordinator is {coordinator!r}, and must be HOST:PORT")


def _join(flags: argparse.Namespace, configuration) -> None:
    """Joins the other processes, which must have been started alike."""
    from terminator_jax.training import distributed

    distributed.join(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        method=None if flags.distributed == "auto" else flags.distributed,
        timeout_s=flags.join_timeout,
    )
    distributed.compare(distributed.started_with(configuration))


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
    cli.run(main, is_service=True)
