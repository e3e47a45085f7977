"""Trains on other devices, and goes on there, and compares the losses of every step.

    make devices        # the table goes to docs/reliability.md

All runs have the same global batch, float64 and SGD. The devices are virtual ones of a CPU.
"""

import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import report
import runs

PAGE = runs.REPOSITORY / "docs" / "reliability.md"
TINY = runs.REPOSITORY / "tests" / "training" / "tiny.py"
FIELDS = (
    "dtype=float64", "optimizer.name=sgd", "optimizer.learning_rate=0.05", "log_every_steps=1",
)  # fmt: skip
LIMIT = 1e-9
# Sends SIGTERM to its own process after so many steps.
STOP = """
import os, signal
from terminator_jax.training import meter
add, left = meter.Meter.add, [{steps}]
def counted(self, metrics):
    add(self, metrics)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGTERM)
meter.Meter.add = counted
"""


def start(
    cache: Path,
    workdir: Path,
    devices: int,
    *fields: str,
    steps: int = 0,
    flags: Sequence[str] = (),
) -> subprocess.Popen:
    """Starts a run on so many devices, which stops after so many steps, or at its end for 0."""
    count = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = runs.command(
        workdir, *FIELDS, *fields, config=TINY, patch=STOP.format(steps=steps) if steps else ""
    )
    return subprocess.Popen(
        [*command, *flags], env=runs.environment(cache) | count | {"JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*processes: subprocess.Popen) -> None:
    """Waits for processes that must end well."""
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err


def losses(workdir: Path) -> list[float]:
    """Returns the loss of each step."""
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def two_processes(root: Path, workdir: Path, parallel: str) -> None:
    """Trains in two processes over loopback with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2"]
    finish(*(
        start(root, workdir, 4, f"parallel={parallel}", flags=[*group, f"--process_id={n}"])
        for n in range(2)
    ))  # fmt: skip


def one_after_the_other(root: Path, workdir: Path, counts: Sequence[int]) -> None:
    """Trains on each number of devices for eleven steps, and on the last to the end."""
    for devices in counts[:-1]:
        finish(start(root, workdir, devices, steps=11))
    finish(start(root, workdir, counts[-1]))


def main() -> None:
    """Runs all, prints a row for each and writes the section."""
    root = Path(tempfile.mkdtemp())
    finish(start(root, root / "eight", 8))
    expected, rows = losses(root / "eight"), []
    ways = {
        "2 processes with 4 devices each, `pmap`": lambda w: two_processes(root, w, "pmap"),
        "2 processes with 4 devices each, `jit`": lambda w: two_processes(root, w, "jit"),
        "8 devices, then 1, 4 and 8": lambda w: one_after_the_other(root, w, (8, 1, 4, 8)),
        "1 device, then 8 and 1": lambda w: one_after_the_other(root, w, (1, 8, 1)),
    }
    for number, (name, run) in enumerate(ways.items()):
        workdir = root / str(number)
        run(workdir)
        pairs = zip(expected, losses(workdir), strict=True)
        worst = np.max([abs(a - b) / abs(a) for a, b in pairs])  # NaN if one is NaN
        rows.append((name, str(len(expected)), f"{worst:.1e}", worst < LIMIT))
        print(*rows[-1], sep=" | ", flush=True)
    shutil.rmtree(root)
    head = ("trained on", "steps", "largest relative difference of the losses")
    text = report.table(head, [row[:3] for row in rows])
    report.write_section("devices", text + "\n\n" + report.conditions("make devices"), PAGE)
    if not all(row[3] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
