"""How fast a session answers, by the number of threads that ask.

    python benchmarks/serving.py runs/digits    # writes a section of docs/performance.md

Each thread sends a request of 1 to 8 random pictures, waits for the answer and sends the next; one
request in a hundred is malformed. Every answer is compared with that of the same pictures alone.
"""

import argparse
import concurrent.futures
import time
from typing import NamedTuple

import numpy as np
import report

import terminator_jax
from terminator_jax.loading import LoadedModel
from terminator_jax.serve import Session

REQUESTS = {1: 2_000, 2: 2_000, 8: 4_000, 32: 10_000, 128: 10_000}  # by the number of threads
DELAY = 0.002
MALFORMED = 0.01
HEAD = ("threads", "p50, ms", "p99, ms", "pictures/s", "of one by one", "answers", "refused",
        "wrong")  # fmt: skip
TOLERANCE = 1e-4


class Load(NamedTuple):
    """What a number of threads saw: seconds of each answer, pictures, wrong ones, errors."""

    latencies: list[float]
    pictures: int
    wrong: int
    errors: int


class OneByOne(NamedTuple):
    """Answers as a session does, in the thread that asks and without batches."""

    loaded: LoadedModel

    def send_data(self, data: np.ndarray) -> np.ndarray:
        """The logits themselves."""
        return self.loaded.logits(data)

    def receive_data(self, ticket: np.ndarray, timeout: float) -> np.ndarray:
        """The ticket, which is the logits."""
        del timeout
        return ticket


def client(session: Session, images: np.ndarray, expected: np.ndarray, seed: int, count: int):
    """One thread's requests."""
    rng = np.random.default_rng(seed)
    latencies, pictures, wrong, errors = [], 0, 0, 0
    for _ in range(count):
        chosen = rng.integers(len(images), size=rng.integers(1, 9))
        malformed = rng.random() < MALFORMED
        start = time.perf_counter()
        try:
            data = images[chosen, :-1] if malformed else images[chosen]
            found = session.receive_data(session.send_data(data), timeout=60)
        except ValueError:
            errors += 1
            wrong += not malformed
            continue
        latencies.append(time.perf_counter() - start)
        pictures += len(chosen)
        wrong += malformed or np.abs(found - expected[chosen]).max() > TOLERANCE
    return Load(latencies, pictures, wrong, errors)


def measure(session: Session, images, expected, threads: int, requests: int) -> tuple[Load, float]:
    """All threads together, and the seconds that they took."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        loads = list(
            pool.map(
                lambda n: client(session, images, expected, n, -(-requests // threads)),
                range(threads),
            )
        )
        seconds = time.perf_counter() - start
    latencies = [value for load in loads for value in load.latencies]
    return Load(latencies, *(sum(column) for column in list(zip(*loads, strict=True))[1:])), seconds


def row(name: str, load: Load, rate: float, one_by_one: float) -> list[str]:
    """A row of the table, which is printed too."""
    p50, p99 = (1000 * np.percentile(load.latencies, q) for q in (50, 99))
    found = [
        name, f"{p50:.1f}", f"{p99:.1f}", f"{rate:,.0f}", f"{rate / one_by_one:.1f}×",
        f"{len(load.latencies):,}", f"{load.errors}", f"{load.wrong}",
    ]  # fmt: skip
    print(*found, sep=" | ", flush=True)
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", help="a run's directory")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    flags = parser.parse_args()
    loaded = terminator_jax.load_model(flags.workdir)
    shape = (256, *loaded.picture_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Session(loaded, max_batch=1, max_delay=0) as session:
        expected = np.concatenate(
            [session.receive_data(session.send_data(image[None])) for image in images]
        )
    load, seconds = measure(OneByOne(loaded), images, expected, 1, REQUESTS[1] // 10)
    rate = load.pictures / seconds
    rows = [row("`loaded.logits`, one by one", load, rate, rate)]
    with Session(loaded, max_delay=DELAY) as session:
        for threads, count in REQUESTS.items():
            load, seconds = measure(session, images, expected, threads, count)
            rows.append(row(f"{threads}", load, load.pictures / seconds, rate))
    if not flags.dry:
        name = loaded.config["model"]["variant"]
        command = report.conditions(f"python benchmarks/serving.py {flags.workdir}")
        text = f"{command} The network is `{name}`.\n\n{report.table(HEAD, rows)}"
        report.write_section("serving", text)


if __name__ == "__main__":
    main()
