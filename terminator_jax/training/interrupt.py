"""Sets a flag at a signal that asks the process to end, so that training stops after the step."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Ctrl-C, what a scheduler sends before it takes the machine away, a terminal that closes, and
# SLURM's --signal=USR1@60. Windows has only the first two.
SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
# Of these a second one ends the process at once, from INSIST_S seconds after the first on. Shells,
# `timeout` and process managers send several at the same time.
INSISTENT = (signal.SIGINT, signal.SIGTERM)
INSIST_S = 1.0
# The exit code of a process that a second signal ends.
INTERRUPTED = 130
PROMISE = b"\nstopping: the step is finished and saved first; a second Ctrl-C ends at once\n"


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Handles signals within it, except those that are ignored, as SIGHUP is after `nohup`.

    Only the main thread of a process may handle signals. In another one nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopSignals(contextlib.ExitStack):
    """Listens to signals: the first only sets `number`; one that insists ends the process with 130.

    Args:
        forward: whether SIGTERM is left to JAX, which several processes have, and others become
            SIGTERM.

    Attributes:
        number: the signal that asked to stop; None before.

    Example:
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.number.name
        'SIGTERM'
    """

    number: signal.Signals | None = None
    _since = 0.0

    def __init__(self, *, forward: bool = False):
        super().__init__()
        self._forward = forward

    def __enter__(self) -> "StopSignals":
        numbers = [n for n in SIGNALS if not (self._forward and n == signal.SIGTERM)]
        self.enter_context(handled(self._request, *numbers))
        return self

    def _request(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = signal.Signals(number), now
            # print may be in use by what was interrupted, and the terminal may be gone.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(sys.__stdout__.fileno(), PROMISE)
            if self._forward:
                signal.raise_signal(signal.SIGTERM)
        elif number in INSISTENT and now - self._since >= INSIST_S:
            os._exit(INTERRUPTED)  # threads that compile would otherwise be torn down under way
