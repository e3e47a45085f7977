"""Kills a training again and again, and compares its end with that of an undisturbed one.

    make faults        # this and faults.py; the tables go to docs/reliability.md

One run is killed by SIGKILL at 20 random moments, also while it saves, and stopped 10 times by each
of SIGTERM, SIGHUP and SIGINT. Each time the same command goes on. A checkpoint that had its name
when the process died must still be there, or a later one.
"""

import argparse
import collections
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import report
import runs

PAGE = runs.REPOSITORY / "docs" / "reliability.md"
COUNTS = {"SIGKILL": 20, "SIGTERM": 10, "SIGHUP": 10, "SIGINT": 10}
EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 0, "SIGHUP": 0, "SIGINT": 130}
# More steps than all the processes do together. Most of the time of each goes into saving.
FIELDS = ("epochs=20", "checkpoint_every_steps=3", "keep_every_epochs=20", "log_every_steps=1")


def disturb(cache: Path, workdir: Path, name: str, after: float) -> tuple[int, int, int, str]:
    """Starts a run, signals it after its first step and a while; what it did.

    Returns:
        Its exit code, the last checkpoints before and after, and what it wrote on standard error.
    """
    process = subprocess.Popen(
        runs.command(workdir, *FIELDS), env=runs.environment(cache), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    drained: list[str] = []
    reader = threading.Thread(target=lambda: drained.extend(process.stdout), daemon=True)
    log = workdir / "log.jsonl"
    seen = log.stat().st_size if log.exists() else 0
    reader.start()
    while process.poll() is None and (not log.exists() or log.stat().st_size == seen):
        time.sleep(0.02)  # until it logs a step
    time.sleep(after)
    before = (runs.steps(workdir) or [0])[-1]
    process.send_signal(getattr(signal, name))
    code = process.wait(60)
    reader.join(10)
    return code, before, (runs.steps(workdir) or [0])[-1], process.stderr.read()


def main() -> None:
    """Runs all, prints a line for each signal and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few", action="store_true", help="two of each signal, and no page")
    flags = parser.parse_args()
    draw = random.Random(flags.seed)
    signals = [name for name, n in COUNTS.items() for _ in range(2 if flags.few else n)]
    draw.shuffle(signals)
    root = Path(tempfile.mkdtemp())
    undisturbed = runs.train(root, root / "whole", *FIELDS)
    assert undisturbed.returncode == 0, undisturbed.stderr

    wrong, lost, counts = [], 0, collections.Counter()
    for number, name in enumerate(signals):
        code, before, after, err = disturb(root, root / "run", name, draw.uniform(0, 0.6))
        counts[name] += 1
        lost += after < before
        if code != EXIT_CODES[name] or err:
            wrong.append(f"{name}: exit code {code}, {err[-300:]!r}")
        print(number + 1, name, "exit", code, "checkpoint", before, "to", after, flush=True)
    end = runs.train(root, root / "run", *FIELDS)
    same = runs.content(root / "run") == runs.content(root / "whole")
    rows = [(name, str(n), str(EXIT_CODES[name])) for name, n in counts.items()]
    text = (
        f"{report.table(('signal', 'times', 'exit code'), rows)}\n\n"
        f"Other exit codes or anything on standard error: {len(wrong)}. Checkpoints lost: {lost}. "
        f"The last start ended with {end.returncode}. Its last checkpoint and its model are "
        f"{'bit for bit those' if same else 'NOT those'} of an undisturbed run."
    )
    print(text, *wrong, sep="\n")
    if not flags.few:
        report.write_section("kills", text + "\n\n" + report.conditions("make faults"), PAGE)
    shutil.rmtree(root)
    if wrong or lost or not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
