"""Time and peak memory of calls, measured side by side."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of malloc.h

Call = Callable[[], object]


def medians(calls: Mapping[str, Call], **limits) -> dict[str, float]:
    """Seconds that each call takes: medians of `series`."""
    return {name: statistics.median(own) for name, own in series(calls, **limits).items()}


def series(
    calls: Mapping[str, Call], *, repeats: int = 7, seconds: float = 0.7
) -> dict[str, list[float]]:
    """Seconds that each call takes, time after time, the calls taking turns.

    A call must return when its work is done. One that takes long is repeated less, three times at
    least, to stay within `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(repeats):
        for name, call in calls.items():
            if turn < 3 or sum(times[name]) < seconds:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return times


def peak_bytes(call: Call) -> int:
    """By how much a call raises the memory of the process at its peak (Linux, glibc)."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is larger comes fresh from the system
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is forgotten
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)
    del result
    return max(0, peak)


def _status(field: str) -> int:
    [line] = [
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(field)
    ]
    return int(line.split()[1]) * 1024
