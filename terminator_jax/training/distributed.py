"""Joins the processes of a run, compares what they were started with, and ends them together.

What jax 0.10.2 does by itself, with two processes on one host:

    process 0's port is taken    it crashes (SIGSEGV) after 1 s, the other aborts after the timeout
    a process does not come      the others abort with a C++ stack 6 s after the timeout
    a process is killed          on CPU an exception of Gloo after 0.1 s, and while the process
                                 leaves an abort; elsewhere as if it were stopped
    a process is stopped         the others abort with a C++ stack after the heartbeat's timeout

Process 0's port is tried before JAX opens it; one that JAX finds by itself is read from JAX's log,
by the logger's name and the message's words. An abort is the signal SIGABRT: its handler prints one
line instead and ends the process with exit code 1. `TF_CPP_MIN_LOG_LEVEL=9`, which must be set
before jax is imported, keeps the C++ stack silent.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import terminator_jax
from terminator_jax.data.examples import Examples
from terminator_jax.errors import InputError, SystemFailure, one_line
from terminator_jax.training.validation import flatten

# Seconds without a sign of life after which JAX calls a process lost.
HEARTBEAT_S = 30
# Seconds for which a process that failed waits for others that fail like it.
LEAVE_S = 15
# Fields that each process may have for itself: they do not change what it computes.
OWN_FIELDS = {
    "compilation_cache",
    "data.data_dir",
    "data.download",
    "data.in_memory",
    "profile",
}
# Words in the errors that JAX raises when another process is lost.
LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_set_handler = ctypes.pythonapi.PyOS_setsig
_set_handler.argtypes, _set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_get_handler = ctypes.pythonapi.PyOS_getsig
_get_handler.argtypes, _get_handler.restype = (ctypes.c_int,), ctypes.c_void_p
# Held by the thread that ends the process.
_last_word = threading.Lock()
# What C may call later must not be collected.
_kept: list[Any] = []


class _Member(NamedTuple):
    """This process among others.

    Attributes:
        name: as in "process 0 of 2".
        notice: tells JAX's preemption service that this process is to stop.
    """

    name: str
    notice: Callable[[], None]


# None unless `join` was called.
_member: _Member | None = None


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
        InputError: if the coordinator's name is unknown, or JAX finds nothing.
        SystemFailure: if process 0's port is taken, or nobody listens there in time.
    """
    global _member
    if coordinator is not None:
        _check_coordinator(coordinator, process_id, timeout_s)
    jax.config.update("jax_enable_preemption_service", True)
    _end_at_abort(
        f"error: not all processes of this run joined within {timeout_s} s: start as many as there "
        "are, with the same coordinator, or give them longer by --join_timeout"
    )
    try:
        with _check_port_in_log():
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=method if coordinator is None else "deactivate",
                initialization_timeout=timeout_s,
                heartbeat_timeout_seconds=HEARTBEAT_S,
            )
    except Exception as error:  # of any kind of cluster
        _set_handler(signal.SIGABRT, None)
        if coordinator is not None or isinstance(error, SystemFailure):
            raise
        raise InputError(
            f"--distributed finds no processes to join ({one_line(error)}): give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    # JAX's own handler of SIGTERM; Python's takes its place while a run trains.
    notice = functools.partial(_Handler(_get_handler(signal.SIGTERM)), signal.SIGTERM)
    _member = _Member(f"process {jax.process_index()} of {jax.process_count()}", notice)
    more = "TF_CPP_MIN_LOG_LEVEL=0 before the start shows why"
    _end_at_abort(_lost_line(_member, more))


def _check_coordinator(coordinator: str, process_id: int | None, timeout_s: float) -> None:
    host, _, port = coordinator.rpartition(":")
    if process_id == 0:
        _check_port(int(port))
    else:
        _wait_for_coordinator(host.strip("[]"), int(port), timeout_s)


def _check_port(port: int) -> None:
    """Raises SystemFailure if process 0 cannot listen at this port, because JAX would crash."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise SystemFailure(
            f"process 0 cannot listen at port {port}: {os.strerror(error.errno)}; choose another "
            "for all processes, by --coordinator or, with --distributed, by JAX_COORDINATOR_PORT"
        ) from error


@contextlib.contextmanager
def _check_port_in_log() -> Iterator[None]:
    """Checks the port that JAX is about to listen at, which it tells to its log before it does."""
    log = logging.getLogger("jax._src.distributed")
    usual, least = log.level, log.getEffectiveLevel()

    def check(record: logging.LogRecord) -> bool:
        _, starts, address = record.getMessage().partition("Starting JAX distributed service on ")
        if starts:
            _check_port(int(address.rpartition(":")[2]))
        return record.levelno >= least

    log.addFilter(check)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(usual)
        log.removeFilter(check)


def _wait_for_coordinator(host: str, port: int, timeout_s: float) -> None:
    """Waits until process 0 listens, because JAX would abort the process if it never does.

    Its name may not be known yet either: that of a pod begins with the pod.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                kind = InputError if isinstance(error, socket.gaierror) else SystemFailure
                raise kind(f"no process 0 at --coordinator={host}:{port}: {error}") from error
        time.sleep(0.2)


@contextlib.contextmanager
def exit_if_a_process_is_lost() -> Iterator[None]:
    """Ends the process with one line if another one is lost within it.

    Other errors are raised as they are. JAX would then wait for the other processes, which may
    never end: it may do so for a while.
    """
    try:
        yield
    except Exception as error:
        if _member is not None:
            _leave(_member, error)
        raise


def _leave(member: _Member, error: Exception) -> None:
    """Ends the process if another one is lost, or sees to it that it ends soon."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    told = isinstance(error, InputError | OSError)
    if not told and any(word in str(error) for word in LOST):
        _end(_lost_line(member, f"JAX says: {one_line(error)}"))
    code = getattr(error, "exit_code", 1)
    if told:
        _end_at_abort("", code)
    timer = threading.Timer(LEAVE_S, _end, ("", code))
    timer.daemon = True
    timer.start()


def _lost_line(member: _Member, more: str) -> str:
    return (
        f"error: {member.name} ends, because another one died, was stopped or cannot be reached "
        f"({more}); start all again to go on from the last checkpoint"
    )


def _end(line: str, code: int = 1) -> NoReturn:
    """Prints a line and ends the process at once: Python's way out would wait for the others."""
    _last_word.acquire()  # for ever: two threads may learn of a lost process at the same time
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace") if line else b"")
    os._exit(code)


def _end_at_abort(line: str, code: int = 1) -> None:
    """Prints a line and ends with an exit code from now on when C++ aborts the process.

    Python's own handlers run only after C++ has returned, which it does not.
    """

    @_Handler
    def end(_: int) -> None:
        _end(line, code)

    _kept.append(end)
    _set_handler(signal.SIGABRT, ctypes.cast(end, ctypes.c_void_p))


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

    JAX's preemption service agrees on the step, within 2 s. A call takes 1 µs and waits for no
    device, where an exchange of flags takes 6 ms (two processes on one CPU).

    Args:
        signal_seen: whether a signal asked this process to stop.
        step: the number of steps done; all processes must call this after each step.
    """
    if _member is None or jax.process_count() == 1:
        return any_process(signal_seen)
    if signal_seen:
        _member.notice()
    return multihost_utils.reached_preemption_sync_point(step)


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
