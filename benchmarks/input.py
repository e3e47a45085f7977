"""How many augmented pictures a second the input pipeline makes, alone.

    TFDS_DATA_DIR=… python benchmarks/input.py    # writes a section of docs/performance.md

Each row is one experiment's own pipeline, pictures in memory as the experiment has it, a batch
after the other until some seconds have passed. What a step needs stands in the table of steps.
"""

import argparse
import time
from pathlib import Path

import report

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training.setup import make_run

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = ("digits", "mnist", "cifar10")
BATCHES = (64, 1024)
SECONDS = 4.0


def rate(name: str, batch: int) -> float:
    """Pictures a second of an experiment's training batches, after the first few."""
    fields = [f"--config.batch_size={batch}", "--config.compilation_cache=False"]
    run = make_run(configs.read(EXPERIMENTS / f"{name}.py", fields))
    batches = run.train_batches()
    for _ in range(3):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run.parallel.shard_batch(next(batches))
        count += batch
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measures, prints and writes."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for name in NAMES:
        for batch in BATCHES:
            try:
                found = f"{rate(name, batch):,.0f}"
            except InputError as error:
                found = str(error)  # a data set that is not there
            rows.append([name, str(batch), found])
            print(*rows[-1], sep=" | ", flush=True)
    table = report.table(["pipeline of", "batch", "pictures/s"], rows)
    report.write_section("input", f"{report.conditions('python benchmarks/input.py')}\n\n{table}")


if __name__ == "__main__":
    main()
