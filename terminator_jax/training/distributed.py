"""Joins the processes of a run, compares what they were started with, and stops them together.

A process that does not come, or is lost, ends the others within two minutes: JAX aborts them, and
says why on stderr. What was saved is whole.
"""

import hashlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import terminator_jax
from terminator_jax.data.examples import Examples
from terminator_jax.errors import InputError, SystemFailure, one_line
from terminator_jax.training.validation import flatten

# Seconds without a sign of life after which JAX calls a process lost, and for which a process that
# ends waits for the others.
HEARTBEAT_S = 30
# Fields that each process may have for itself: they do not change what it computes.
OWN_FIELDS = {
    "compilation_cache",
    "data.data_dir",
    "data.download",
    "data.in_memory",
    "profile",
}


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    method: str | None = None,
    timeout_s: int = 40,
) -> None:
    """Joins the processes of a run; call it before anything else of JAX.

    Without a coordinator JAX finds out everything by itself: in a TPU pod, under SLURM, Open MPI,
    mpi4py or Kubernetes.

    Args:
        coordinator: `host:port`, at which process 0 listens.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        method: the only way for JAX to find out, such as "slurm" or "mpi4py"; None for any.
        timeout_s: seconds in which all must have come.

    Raises:
        InputError: if JAX finds no processes.
        SystemFailure: if process 0's port is taken, at which JAX would crash.
    """
    if coordinator is not None and process_id == 0:
        try:
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            reason = os.strerror(error.errno)
            raise SystemFailure(f"process 0 cannot listen at {coordinator}: {reason}") from error
    jax.config.update("jax_enable_preemption_service", True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=method if coordinator is None else "deactivate",
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except Exception as error:  # of any kind of cluster
        if coordinator is not None:
            raise SystemFailure(f"the processes of the run: {one_line(error)}") from error
        raise InputError(
            f"--distributed finds no processes to join ({one_line(error)}): give --coordinator, "
            "--num_processes and --process_id"
        ) from error


def has_joined() -> bool:
    """Returns whether `join` was called: then SIGTERM is for JAX to handle."""
    return jax.process_count() > 1 and jax.config.jax_enable_preemption_service


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is set in any of the processes; all of them must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def wait_for_all() -> None:
    """Waits until all processes have called this."""
    any_process(False)


def stop_together(signal_seen: bool, step: int) -> bool:
    """Returns whether to stop after this step: True at the same step in all processes.

    Where the processes have joined, JAX's preemption service agrees on a step after SIGTERM to any
    of them, within 2 s. A call takes 1 µs and waits for no device, where an exchange of flags takes
    6 ms (two processes on one CPU).

    Args:
        signal_seen: whether a signal asked this process to stop.
        step: the number of steps done; all processes must call this after each step.
    """
    return (
        multihost_utils.reached_preemption_sync_point(step)
        if has_joined()
        else any_process(signal_seen)
    )


def signal_of_any(number: signal.Signals | None) -> signal.Signals:
    """Returns what asked the processes to stop; all of them must call this.

    Without an answer it was SIGTERM before this process listened, or a wish of JAX's own.
    """
    numbers = multihost_utils.process_allgather(np.array(number or 0))
    return signal.Signals(int(numbers.max()) or signal.SIGTERM)


def started_with(config: ConfigDict) -> dict[str, Any]:
    """Returns what must be the same in all processes before the data are opened."""
    mine = {f"config.{name}": x for name, x in flatten(config) if name not in OWN_FIELDS}
    return mine | {"terminator_jax": terminator_jax.__version__, "jax": jax.__version__}


def compare_run(train: Examples, evaluation: Examples, step: int) -> None:
    """Compares the data and the last checkpoint; all processes must call this.

    Args:
        train: the examples to train on.
        evaluation: the examples to evaluate on.
        step: of the last checkpoint that this process sees in `--workdir`; 0 if there is none.

    Raises:
        InputError: in every process, if those of any two differ.
    """
    if jax.process_count() > 1:
        data = {"the training data": train, "the evaluation data": evaluation}
        facts = {name: _describe(examples) for name, examples in data.items()}
        compare({**facts, "the step of the last checkpoint in --workdir": step})


def _describe(examples: Examples) -> str:
    """Returns name and size of a data set and a checksum of some of its examples."""
    some = examples.read(np.unique(np.linspace(0, len(examples) - 1, 16).astype(int)))
    content = b"".join(np.ascontiguousarray(some[name]).tobytes() for name in sorted(some))
    checksum = hashlib.sha256(content).hexdigest()[:12]
    return f"{examples.name} ({len(examples)} examples, checksum {checksum})"


def compare(facts: Mapping[str, Any]) -> None:
    """Compares what the processes were started with; all of them must call this.

    Args:
        facts: values by their names, to be written as JSON.

    Raises:
        InputError: in every process, if the facts of any two differ.
    """
    if jax.process_count() == 1:
        return
    found = differences([json.loads(text) for text in _gather(json.dumps(dict(facts)))])
    if found:
        more = f" (and {len(found) - 3} more differ)" if len(found) > 3 else ""
        raise InputError(
            f"the processes of a run must be alike: {'; '.join(found[:3])}{more}; start all of "
            "them alike"
        )


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists what is not the same in all processes, whose facts are given in order.

    Example:
        >>> differences([{"jax": "0.10"}, {"jax": "0.9"}, {"jax": "0.10"}])
        ['jax is 0.10 in processes 0, 2 and 0.9 in process 1']
    """
    found = []
    for name in dict.fromkeys(name for mine in facts for name in mine):
        processes: dict[str, list[int]] = {}
        for process, mine in enumerate(facts):
            processes.setdefault(str(mine.get(name)), []).append(process)
        if len(processes) > 1:
            named = (f"{value} in {_name(ids)}" for value, ids in processes.items())
            found.append(f"{name} is {' and '.join(named)}")
    return found


def _name(processes: Sequence[int]) -> str:
    more = f" and {len(processes) - 4} more" * (len(processes) > 4)
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes[:4]))}{more}"


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes in their order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(mine.size))
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
