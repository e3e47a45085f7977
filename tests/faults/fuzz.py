"""Feeds thousands of damaged inputs to what reads files and flags, in this process.

    make fuzz          # minutes; the table goes to docs/reliability.md

Every answer must be a result or an error of one line, within 30 s, with less than 1 GB more memory
than before, and without a file outside of the directory that was named.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import report
import runs

sys.path.insert(0, str(runs.REPOSITORY / "tests" / "training"))

import small
from absl import logging

from terminator_jax import convert, load_model, npz, train
from terminator_jax.errors import InputError
from terminator_jax.training import cli, history, integrity, loop, validation
from terminator_jax.training import config as configs
from terminator_jax.training.checkpoint import Checkpoints, check_workdir, latest_step
from terminator_jax.training.setup import make_run

PAGE = runs.REPOSITORY / "docs" / "reliability.md"
SECONDS, BYTES = 30, 2**30
# What is allowed to come out: one line for the user.
EXPECTED = (ValueError, ModuleNotFoundError, SystemExit)

Case = Callable[[random.Random], object]


def mutate(draw: random.Random, data: bytes) -> bytes:
    """Returns the bytes with a few flipped, cut out, doubled or replaced."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.choice((1, 8, 1000))]
            case 2:
                data[at:at] = data[at : at + draw.choice((1, 8, 1000))]
            case 3:
                data[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, b"99999999", b"-1e309]}"))
            case 4:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
    return bytes(data)


VALUES = ("", "0", "-1", "1e400", "nan", "inf", "²", "10" * 20, "None", "True", "(1,", "'", "[]",
          "\0", "ä", "{}", "1.5", "--", "x" * 5000, "(1, 2)", "runs/../..", "%s",
          "train[:1%]")  # fmt: skip


def mutate_json(draw: random.Random, value: object) -> object:
    """Returns JSON with one value somewhere inside replaced, lost or put into a list."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.05:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: mutate_json(draw, value[key])}
    return draw.choice(
        (
            None,
            True,
            -1,
            10**30,
            1e308,
            float("nan"),
            "",
            "x",
            [],
            {},
            [value],
            {"a": value},
            [[[]]],
        )
    )


class Inputs:
    """Valid inputs, which the cases damage."""

    def __init__(self, root: Path):
        self.root = root
        self.config = small.get_config()
        self.run_directory = root / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(self.config, self.run_directory)
        self.run = make_run(self.config)
        self.model = (self.run_directory / "model.safetensors").read_bytes()
        arrays = io.BytesIO()
        np.savez_compressed(arrays, image=np.zeros((9, 8, 8, 1), np.uint8), label=np.arange(9))
        self.arrays = arrays.getvalue()
        release = runs.REPOSITORY / "tests" / "golden" / "terminator_2d_size8.npz"
        with np.load(release) as found:
            self.release = {k.removeprefix("param:"): v.shape for k, v in found.items()}
        self.json = json.loads(configs.to_json(self.config))
        self.files = [
            path.relative_to(self.run_directory) for path in self.run_directory.rglob("*")
            if path.is_file()
        ]  # fmt: skip

    def place(self) -> Path:
        """Returns a fresh copy of the run."""
        place = self.root / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.run_directory, place)
        return place


def cases(inputs: Inputs) -> dict[str, Case]:
    """Returns what is tried, by name: each takes a source of random numbers."""
    file = inputs.root / "file"

    def configurations(draw: random.Random) -> object:
        if draw.random() < 0.5:
            return configs.from_json(json.dumps(mutate_json(draw, inputs.json)))
        return configs.from_json(mutate(draw, json.dumps(inputs.json).encode()).decode())

    def command_lines(draw: random.Random) -> object:
        fields = [path for path, _ in validation.flatten(inputs.config)]
        words = ["--config=digits"]
        for _ in range(draw.randrange(1, 4)):
            field = f"config.{draw.choice(fields)}"
            others = ("config", "workdir", "num_processes", "config.model.options.size", "x")
            name = draw.choice((field, field, *others))
            words.append(f"--{name}" + draw.choice(("=", " ", "")) + draw.choice(VALUES))
        sys.argv[1:] = words
        return cli.run(train.main, is_service=True)

    def workdirs(draw: random.Random) -> object:
        place = inputs.place()
        path = place / draw.choice(inputs.files)
        path.write_bytes(mutate(draw, path.read_bytes()))
        step = latest_step(place)
        history.quality("accuracy", (history.read(place, 10**9) or [{}])[-1])
        return check_workdir(place, inputs.config), integrity.problem(place / "checkpoints", step)

    def checkpoints(draw: random.Random) -> object:
        """Without its checksums, as a checkpoint of an older version."""
        place = inputs.place()
        files = [name for name in inputs.files if name.parts[:2] == ("checkpoints", "44")]
        path = place / draw.choice(files)
        path.write_bytes(mutate(draw, path.read_bytes()))
        with contextlib.closing(Checkpoints(place, read_only=True)) as found:
            return inputs.run.restore(found, 44)

    def safetensors(draw: random.Random) -> object:
        path = file.with_suffix(".safetensors")
        path.write_bytes(mutate(draw, inputs.model))
        return load_model(path)

    def arrays(draw: random.Random) -> object:
        path = file.with_suffix(".npz")
        path.write_bytes(mutate(draw, inputs.arrays))
        return npz.read(path)

    def state_dicts(draw: random.Random) -> object:
        shapes = dict(inputs.release)
        for _ in range(draw.randrange(1, 4)):
            name = draw.choice(list(shapes))
            shape = shapes.pop(name)
            digits = [i for i, letter in enumerate(name) if letter.isdigit()]
            if digits and draw.random() < 0.5:
                at = draw.choice(digits)
                name = name[:at] + draw.choice(("7", "999999999", "")) + name[at + 1 :]
            shapes[name] = tuple(draw.choice((n, 0, 1, n + 1)) for n in shape[: draw.randrange(5)])
        return convert.terminator_from_release(
            {k: np.ones(v, np.float32) for k, v in shapes.items()}
        )

    return {
        "configurations": configurations, "command lines": command_lines, "workdirs": workdirs,
        "checkpoints": checkpoints, ".safetensors": safetensors, ".npz": arrays,
        "state dicts": state_dicts,
    }  # fmt: skip


def attempt(case: Case, draw: random.Random) -> tuple[str, str]:
    """Runs a case; returns how it ended, and what is wrong with that, if anything."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end, wrong, err = "result", "", io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            case(draw)
    except EXPECTED as error:
        end = "refused"
        if isinstance(error, InputError | SystemExit) and err.getvalue().count("\n") > 2:
            wrong = f"more than a line: {err.getvalue()[:300]}"
    except BaseException:
        end, wrong = "traceback", traceback.format_exc()[-1500:]
    seconds = time.monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > SECONDS or grown > BYTES:
        wrong += f" {seconds:.0f} s, {grown / 1e9:.1f} GB"
    return end, wrong


def measure(name: str, case: Case, count: int, seed: int) -> Iterator[str]:
    """Runs a case so many times; yields the row, and prints what is wrong."""
    ends, longest, bad = {"result": 0, "refused": 0, "traceback": 0}, 0.0, 0
    for number in range(count):
        start = time.monotonic()
        end, wrong = attempt(case, random.Random(f"{name} {seed} {number}"))
        longest = max(longest, time.monotonic() - start)
        ends[end] += 1
        if wrong:
            bad += 1
            print(f"{name} {number}: {wrong}", file=sys.stderr, flush=True)
    yield from (name, str(count), *map(str, ends.values()), f"{longest:.2f}", str(bad))


def main() -> None:
    """Runs all cases and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the name of a case")
    flags = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    cli.hide_background_errors()
    warnings.simplefilter("ignore")
    train_loop, root = loop.train, Path(tempfile.mkdtemp())
    inputs = Inputs(root)

    def stop(*_: object) -> None:
        raise InputError("this is as far as it goes")

    loop.train = stop
    here = set(Path.cwd().iterdir())
    rows = []
    for name, case in cases(inputs).items():
        if flags.only in (None, name):
            rows.append(tuple(measure(name, case, flags.count, flags.seed)))
            print(*rows[-1], sep=" | ", flush=True)
    loop.train = train_loop
    outside = set(Path.cwd().iterdir()) - here
    shutil.rmtree(root)
    head = ("input", "cases", "read", "refused", "traceback", "longest, s", "wrong")
    text = f"{report.table(head, rows)}\n\nFiles written outside: {len(outside)}."
    if flags.only is None and flags.count >= 1000:
        report.write_section("fuzz", text + "\n\n" + report.conditions("make fuzz"), PAGE)
    sys.exit(any(row[-1] != "0" for row in rows) or bool(outside))


if __name__ == "__main__":
    main()
