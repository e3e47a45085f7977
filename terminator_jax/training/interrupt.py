"""Turns signals that ask the process to end into a wish to stop after the current step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

# Ctrl-C, a terminal that closes, and what a scheduler sends before it takes the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The exit code of a process that a second signal ends.
INTERRUPTED = 130
PROMISE = b"\nstopping: the step is finished and saved first; a second signal ends at once\n"


class StopSignals:
    """Listens to signals: the first only sets `number`, a second one ends the process with 130.

    Only the main thread of a process may handle signals. In another one nothing changes.

    Attributes:
        number: the signal that asked to stop; None before.

    Example:
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.number.name
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            os._exit(INTERRUPTED)  # threads that compile would otherwise be torn down under way
        self.number = signal.Signals(number)
        os.write(1, PROMISE)  # print may be in use by what was interrupted
