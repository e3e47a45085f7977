"""Turns signals that ask the process to end into a wish to stop after the current step."""

import signal
from typing import Any

# Ctrl-C, and what a scheduler sends to a machine that is about to be taken away.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Within it, the first signal only sets `stop_requested`; a second one ends the process.

    Attributes:
        stop_requested: whether the run is to stop.

    Example:
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.stop_requested
        True
    """

    def __init__(self) -> None:
        self.stop_requested = False

    def __enter__(self) -> "StopSignals":
        self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_: Any) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
