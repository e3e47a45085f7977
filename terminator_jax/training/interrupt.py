"""Ctrl-C as a wish to stop after the step that runs, instead of an exception anywhere."""

import signal
from typing import Any


class Interrupt:
    """Within it, the first Ctrl-C only sets `asked`; a second one raises KeyboardInterrupt.

    Attributes:
        asked: whether the run is to stop.

    Example:
        >>> with Interrupt() as interrupt:
        ...     signal.raise_signal(signal.SIGINT)
        ...     interrupt.asked
        True
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
