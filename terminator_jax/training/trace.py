"""Traces a few steps, for TensorBoard's profiler and XProf."""

from pathlib import Path
from typing import Any

import jax

# Steps before the trace, which compile and fill caches, and steps in it.
WARMUP_STEPS, TRACE_STEPS = 3, 5


class Trace:
    """Traces some steps of a run; a context manager.

    Args:
        directory: where the trace is written, below `plugins/profile`.
        enabled: whether to trace at all.
    """

    def __init__(self, directory: Path, *, enabled: bool):
        self._directory, self._enabled, self._running = directory, enabled, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def step(self, done: int, result: Any) -> None:
        """Starts or stops the trace where it is time; call it after each step.

        Args:
            done: steps done since the process began.
            result: what the step returned, which the end of the trace waits for.
        """
        if not self._enabled:
            return
        if done in (WARMUP_STEPS, WARMUP_STEPS + TRACE_STEPS):
            jax.block_until_ready(result)
        if done == WARMUP_STEPS:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif done == WARMUP_STEPS + TRACE_STEPS:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
