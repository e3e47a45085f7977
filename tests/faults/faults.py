"""Injects faults into trainings of a small model, and makes the table of docs/reliability.md.

    make faults

Each row is one process or more. The columns are what was done, the last line that the process
wrote, its exit code, and what is kept: the step at which the next start, without the fault, ends.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
import runs

PAGE = runs.REPOSITORY / "docs" / "reliability.md"
FIELDS = ("epochs=2", "keep_every_epochs=1")
LAST = 44  # its last step


class Row(NamedTuple):
    """What is known of a fault."""

    fault: str
    line: str
    code: str
    kept: str
    is_good: bool


class Lab:
    """A place for runs, with one that is finished to begin from."""

    def __init__(self, root: Path):
        self.root = root
        self.finished = root / "finished"
        done = runs.train(root, self.finished, *FIELDS)
        assert done.returncode == 0, done.stderr
        self._count = 0

    def place(self, *, finished: bool = False) -> Path:
        """Returns a new directory, or a copy of the finished run."""
        self._count += 1
        place = self.root / f"run{self._count}"
        if finished:
            shutil.copytree(self.finished, place)
        return place

    def tidy(self, text: str) -> str:
        """Returns a line without the names of temporary places."""
        return text.replace(str(self.root), "RUNS").replace("|", "\\|")

    def row(
        self, fault: str, done: subprocess.CompletedProcess, code: int, workdir: Path | None = None,
        *, at: int = LAST,
    ) -> Row:  # fmt: skip
        """Returns a row; the next start must end at step `at`, unless there is no directory."""
        kept, is_whole = "nothing was written", True
        if workdir is not None:
            again = runs.train(self.root, workdir, *FIELDS)
            found = runs.steps(workdir)
            is_whole = again.returncode == 0 and found[-1:] == [at]
            kept = f"the next start ends at step {found[-1] if found else 0}"
            if not is_whole:
                kept += f", exit code {again.returncode}: {runs.last_line(again)}"
        good = done.returncode == code and not runs.is_traceback(done) and is_whole
        line = self.tidy(runs.last_line(done))
        return Row(fault, f"`{line[:230]}`", str(done.returncode), self.tidy(kept), good)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """Mounts a file system of some bytes in memory; gives False without the right to."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)


def full_disks(lab: Lab) -> Iterator[Row]:
    """Disks that are full at ten moments of a run."""
    used = sum(path.stat().st_size for path in lab.finished.rglob("*") if path.is_file())
    for tenth in range(1, 11):
        place = lab.place()
        with small_disk(place, max(used * tenth // 12, 8192)) as mounted:
            if not mounted:
                return
            done = runs.train(lab.root, place / "run", *FIELDS)
            kept = runs.steps(place / "run")
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            row = lab.row(f"a disk that is full after {tenth}/12", done, 1, place / "run")
            yield row._replace(kept=f"checkpoints {kept}; {row.kept}")


def read_only_disk(lab: Lab) -> Iterator[Row]:
    """A disk that the system makes read-only in the middle of a run, as after an error of ext4."""
    place, image = lab.place(), lab.root / "disk"
    image.write_bytes(bytes(2**26))
    place.mkdir()
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(place)]
    for command in (["mkfs.ext4", "-q", str(image)], mount):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return
    try:
        process = subprocess.Popen(
            runs.command(place / "run", "epochs=4000"), env=runs.environment(lab.root), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        while not runs.steps(place / "run") and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", str(place)], text=True)
        Path("/sys/fs/ext4", Path(device.strip()).name, "trigger_fs_error").write_text("1")
        _, err = process.communicate(timeout=60)
        kept = runs.steps(place / "run")
        done = subprocess.CompletedProcess([], process.returncode, "", err)
        row = lab.row("a disk that becomes read-only in a run", done, 1)
        yield row._replace(kept=f"checkpoints {kept}", is_good=row.is_good and bool(kept))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def damaged_checkpoints(lab: Lab) -> Iterator[Row]:
    """Each file of the newest checkpoint with a flipped byte, cut, and lost."""
    newest = lab.finished / "checkpoints" / str(LAST)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    ways: dict[str, Callable[[Path], object]] = {
        "with a flipped byte": _flip,
        "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "lost": Path.unlink,
    }
    for n, name in enumerate(files):
        for way, damage in ways.items():
            if way != "with a flipped byte" and n % 3:  # of each kind a third
                continue
            place = lab.place(finished=True)
            damage(place / "checkpoints" / str(LAST) / name)
            done = runs.train(lab.root, place, *FIELDS)
            shown = "a file of the newest checkpoint " + way
            said = next((line for line in done.stdout.splitlines() if "moved to" in line), "")
            done = subprocess.CompletedProcess([], done.returncode, said, done.stderr)
            yield lab.row(f"{shown}: `{_short(name)}`", done, 0, place)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def _short(name: Path) -> str:
    return name.as_posix() if len(name.name) < 24 else f"{name.parent.as_posix()}/…"


def damaged_files(lab: Lab) -> Iterator[Row]:
    """Other files of a run with foreign bytes, in the middle of a run."""
    noise = np.random.default_rng(0).bytes(2000)
    for name in ("log.jsonl", "events.out.*", "config.json", "data.json", "README.md",
                 "model.safetensors", "lock", "checksums/22.json"):  # fmt: skip
        place = lab.place()
        runs.train(lab.root, place, "epochs=1", "optimizer.warmup_epochs=0.5")
        shutil.rmtree(place)
        shutil.copytree(lab.finished, place)
        shutil.rmtree(place / "checkpoints" / str(LAST))  # so that there is still something to do
        for file in place.glob(name):
            file.write_bytes(noise)
        done = runs.train(lab.root, place, *FIELDS)
        yield lab.row(f"foreign bytes in `{name}`", done, 0, place)
    place = lab.place(finished=True)
    shutil.rmtree(place / "checkpoints" / str(LAST))
    (place / "config.json").unlink()
    yield lab.row("`config.json` lost", runs.train(lab.root, place, *FIELDS), 0, place)


def damaged_data(lab: Lab) -> Iterator[Row]:
    """Own pictures and a prepared data set that are damaged."""
    file = lab.root / "pictures.npz"
    draw = np.random.default_rng(0)
    image, label = draw.integers(0, 256, (200, 8, 8, 1), np.uint8), np.arange(200) % 10
    np.savez_compressed(file, image=image, label=label)
    own = (f"data.name={file}", "batch_size=32", "eval_batch_size=10", *FIELDS)
    whole = file.read_bytes()
    for fault, content in (
        ("cut in half", whole[: len(whole) // 2]),
        ("of foreign bytes", draw.bytes(3000)),
        ("that is empty", b""),
    ):
        file.write_bytes(content)
        yield lab.row(f"an `.npz` {fault}", runs.train(lab.root, lab.place(), *own), 2)
    file.write_bytes(whole)
    runs.cut_zip(file)
    yield lab.row("an `.npz` with a flipped byte", runs.train(lab.root, lab.place(), *own), 2)

    prepared = next((lab.root / "terminator_jax").rglob("dataset_info.json"))
    records = next(prepared.parent.glob("*train*array_record*"))
    for fault, path, data in (
        ("foreign bytes in `dataset_info.json`", prepared, b"{..."),
        ("a file of records cut in half", records, records.read_bytes()[:9000]),
        ("a lost file of records", records, None),
    ):
        before = path.read_bytes()
        path.unlink() if data is None else path.write_bytes(data)
        yield lab.row(fault, runs.train(lab.root, lab.place(), *FIELDS), 2)
        path.write_bytes(before)


NAN = """
from terminator_jax.training import loop
import jax, jax.numpy as jnp
make = loop.make_train_step
def broken(*arguments):
    step = make(*arguments)
    def poisoned(state, batch):
        state, metrics = step(state, batch)
        return state._replace(params=jnp.where(state.step == 30, jnp.nan, state.params)), metrics
    return poisoned
loop.make_train_step = broken
"""


def not_finite(lab: Lab) -> Iterator[Row]:
    """Parameters that become NaN by a fault of the machine."""
    place = lab.place()
    done = runs.train(lab.root, place, *FIELDS, patch=NAN)
    yield lab.row("NaN in the parameters after step 30", done, 2, place)
    done = runs.train(lab.root, lab.place(), *FIELDS, "optimizer.learning_rate=1e38")
    yield lab.row("a learning rate of 1e38", done, 2)


def two_writers(lab: Lab) -> Iterator[Row]:
    """A second process in the same directory."""
    place = lab.place()
    first = subprocess.Popen(
        runs.command(place, "epochs=4000"), env=runs.environment(lab.root),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (place / "log.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    done = runs.train(lab.root, place, "epochs=4000")
    first.kill()
    first.wait()
    yield lab.row("a second process in the same directory", done, 2)


def outputs(lab: Lab) -> Iterator[Row]:
    """Standard output that nobody reads, or that takes nothing: training goes on without it."""
    for fault, shell in (("standard output closed after a line", "| head -1"),
                         ("a full standard output", "> /dev/full")):  # fmt: skip
        place = lab.place()
        words = " ".join(f"'{word}'" for word in runs.command(place, *FIELDS))
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {words} {shell}"], env=runs.environment(lab.root),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        yield lab.row(fault, done, 0, place)


def numbers(lab: Lab) -> Iterator[Row]:
    """Numbers that are none, and sizes that cannot be allocated."""
    digits = runs.REPOSITORY / "experiments" / "digits.py"
    for field in ("epochs=²", "epochs=nan", "optimizer.learning_rate=inf", "optimizer.beta1=nan",
                  "seed=-1", "batch_size=100000000000000000000", "data.mean=(float,)"):  # fmt: skip
        done = runs.train(lab.root, lab.place(), field)
        yield lab.row(f"`--config.{field}`", done, 2)
    for field, code in (
        ("model.options.global_hidden=100000000", 2),
        ("model.options.num_classes=10000000000", 2),
        ("model.options.global_hidden=10000000", 1),
    ):
        done = runs.train(lab.root, lab.place(), field, config=digits)
        yield lab.row(f"`--config.{field}`", done, code)


def bug(lab: Lab) -> Iterator[Row]:
    """A bug of the package."""
    patch = (
        "from terminator_jax.training import loop\nloop.make_evaluate = lambda run: lambda: 1 / 0"
    )
    done = runs.train(lab.root, lab.place(), *FIELDS, patch=patch)
    first = next((line for line in done.stderr.splitlines() if line.startswith("error")), "")
    good = done.returncode == 1 and runs.is_traceback(done) and "the log is" in first
    yield Row("a bug, with its traceback", f"`{lab.tidy(first)}`", str(done.returncode), "", good)


FAULTS = (
    full_disks, read_only_disk, damaged_checkpoints, damaged_files, damaged_data, not_finite,
    two_writers, outputs, numbers, bug,
)  # fmt: skip


def main() -> None:
    """Runs the faults, prints each row and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one of " + ", ".join(f.__name__ for f in FAULTS))
    flags = parser.parse_args()
    lab, rows = Lab(Path(tempfile.mkdtemp())), []
    for fault in FAULTS:
        if flags.only in (None, fault.__name__):
            for row in fault(lab):
                rows.append(row)
                print("" if row.is_good else "WRONG ", *row[:4], sep=" | ", flush=True)
    shutil.rmtree(lab.root)
    if flags.only is None:
        head = ("fault", "the line", "exit code", "what is kept")
        text = report.table(head, [row[:4] for row in rows])
        report.write_section("faults", text + "\n\n" + report.conditions("make faults"), PAGE)
    sys.exit(any(not row.is_good for row in rows))


if __name__ == "__main__":
    main()
