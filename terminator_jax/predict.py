"""Predicts the classes of pictures. See `--help`."""

import csv
import json
import sys
from collections.abc import Iterable, Sequence

from terminator_jax.errors import InputError
from terminator_jax.training import cli

Row = tuple[str, list[tuple[str, float]]]

DESCRIPTION = """\
Predicts the classes of pictures with the trained model of a run.

    python -m terminator_jax.predict runs/digits picture.png
    python -m terminator_jax.predict runs/digits pictures/ 'more/*.png' batch.npy --top=1
    python -m terminator_jax.predict model.safetensors pictures/ --format=csv > classes.csv
    cat picture.png | python -m terminator_jax.predict runs/digits -
    find . -name '*.png' | python -m terminator_jax.predict runs/digits - --format=jsonl

MODEL is the directory of a run, or a file model.safetensors. PATH is
    a picture (PNG or JPEG)
    a folder: all pictures and .npy files in it and below
    a pattern in quotes, such as 'pictures/**/*.png'
    an .npy file of uint8 or uint16: a picture (height, width, channels), or several, one after
    the other along a first axis
    - for standard input: a picture, an .npy, or names of such files, one a line

Pictures are resized only if the run set config.data.resize; for others there is --fit. The output
has the name of each picture, and its most likely classes with their probabilities. What cannot be
read, or does not fit the model, is named on standard error and left out, and the exit code is 1.
"""
FORMATS = ("table", "jsonl", "csv")
NAMED = 5  # files of other kinds, by name


def main(arguments: Sequence[str]) -> int:
    """Reads the flags, predicts and prints the classes; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a run's directory, or a .safetensors file")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="pictures: see above")
    parser.add_argument(
        "--top", type=int, default=3, help="how many classes to give for each picture (default: 3)"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument(
        "--fit", action="store_true", help="scale and convert pictures of another size or colour"
    )
    flags = parser.parse_args(arguments)
    if flags.top < 1:
        raise InputError(f"--top is {flags.top}, and must be 1 or more")
    # Imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax import prediction

    loaded, problems, others = cli.load_model(flags.model), [], []

    def report(problem: str) -> None:
        problems.append(problem)
        print(problem, file=sys.stderr)

    named = prediction.read_fitting(loaded, flags.paths, flags.fit, report=report, others=others)
    WRITERS[flags.format](prediction.predict(loaded, named, flags.top), loaded.classes)
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        print(f"left out, no pictures: {', '.join(others[:NAMED])}{more}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} could not be predicted, as said above", file=sys.stderr)
    return 1 if problems else 0


def _write_table(rows: Iterable[Row], classes: Sequence[str]) -> None:
    width = max(map(len, classes))
    for name, found in rows:
        columns = "  ".join(f"{kind:>{width}} {100 * value:5.1f} %" for kind, value in found)
        print(f"{columns}   {name}", flush=True)


def _write_jsonl(rows: Iterable[Row], classes: Sequence[str]) -> None:
    del classes
    for name, found in rows:
        kinds = [{"class": kind, "probability": round(value, 6)} for kind, value in found]
        print(json.dumps({"picture": name, "classes": kinds}, ensure_ascii=False), flush=True)


def _write_csv(rows: Iterable[Row], classes: Sequence[str]) -> None:
    del classes
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["picture", "rank", "class", "probability"])
    for name, found in rows:
        for rank, (kind, value) in enumerate(found, start=1):
            writer.writerow([name, rank, kind, f"{value:.6f}"])


WRITERS = {"table": _write_table, "jsonl": _write_jsonl, "csv": _write_csv}


if __name__ == "__main__":
    cli.run(main, extra="predict")
