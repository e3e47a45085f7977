"""How long a checkpoint keeps the next step waiting, and how long until it is whole.

    TFDS_DATA_DIR=… python benchmarks/saving.py    # writes a section of docs/reliability.md

Each row is the state of one experiment with its whole network, saved five times.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import report

from terminator_jax.training import config as configs
from terminator_jax.training.checkpoint import Checkpoints
from terminator_jax.training.setup import make_run

ROOT = Path(__file__).parent.parent
NAMES = ("digits", "mnist", "cifar10")
TIMES = 5


def measure(name: str) -> tuple[float, float, float]:
    """Returns the megabytes of a state, and the median seconds of both waits."""
    fields = ["--config.data.in_memory=False", "--config.parallel=jit"]
    run = make_run(configs.read(ROOT / "experiments" / f"{name}.py", fields))
    batches, waits, wholes = run.train_batches(), [], []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state)) / 1e6
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Checkpoints(Path(folder))) as checkpoints,
    ):
        for step in range(1, TIMES + 2):
            jax.block_until_ready(run.state)
            start = time.perf_counter()
            run.save(checkpoints, step, batches, None)
            waits.append(time.perf_counter() - start)
            checkpoints.wait()
            wholes.append(time.perf_counter() - start)
    return size, statistics.median(waits[1:]), statistics.median(wholes[1:])


def main() -> None:
    """Measures, prints and writes."""
    rows = [(name, *measure(name)) for name in NAMES]
    head = ("experiment", "state, MB", "the next step waits, s", "whole after, s")
    text = report.table(
        head, [(name, f"{mb:.1f}", *(f"{s:.3f}" for s in times)) for name, mb, *times in rows]
    )
    text += "\n\n" + report.conditions("python benchmarks/saving.py")
    print(text)
    report.write_section("saving", text, ROOT / "docs" / "reliability.md")


if __name__ == "__main__":
    main()
