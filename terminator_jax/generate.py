"""Fills a grid with text. See `--help`."""

import math
import re
import sys
from collections.abc import Sequence

from terminator_jax.errors import InputError
from terminator_jax.training import cli

DESCRIPTION = """\
Fills a grid with text, in all directions at once, with the trained model of a run.

    python -m terminator_jax.generate --config=text2d
    python -m terminator_jax.generate runs/text2d --rounds=24 --prompt="my love" --at=7,5
    python -m terminator_jax.generate runs/text2d --temperature=0.5 --top_k=8 --grid=8,40

On a terminal the grid fills in place; elsewhere each round is printed. A dot is a byte that is
still hidden, ↵ is the end of a line.
"""


def main(arguments: Sequence[str]) -> int:
    """Reads the flags, fills a grid and prints it after each round; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_run(positional=True)
    parser.add_step()
    parser.add_argument("--rounds", type=int, default=16, help="number of decoding rounds")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample from the k most likely bytes; 0 is all"
    )
    parser.add_argument("--prompt", default="", help="a text to start from")
    parser.add_argument("--at", default="0,0", metavar="ROW,COLUMN", help="position of the prompt")
    parser.add_argument("--grid", metavar="ROWS,COLUMNS", help="grid size (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    flags = parser.parse_args(arguments)
    workdir = cli.run_directory(flags)
    _check(flags)
    step = cli.checkpoint_step(flags)
    grid = _pair("--grid", flags.grid, least=1) if flags.grid else None
    at = _pair("--at", flags.at, least=0)

    # Imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax.training import generation

    task, model = generation.load(workdir, step)
    tokens, hidden = generation.prompt_grid(grid or task.config.data.grid, flags.prompt, at)
    filled = generation.fill(
        model, tokens[None], hidden[None], rounds=flags.rounds, temperature=flags.temperature,
        top_k=flags.top_k, seed=flags.seed,
    )  # fmt: skip
    rounds = ((generation.render(tokens[0], left[0]), int(left.sum())) for tokens, left in filled)
    _print(generation.render(tokens, hidden), rounds)
    return 0


def _print(lines: list[str], rounds) -> None:
    """Prints the grid after each round, on a terminal in place."""
    terminal = sys.stdout.isatty()
    if terminal:
        print(*lines, "begins", sep="\n", flush=True)
    up = f"\x1b[{len(lines) + 1}A\x1b[J" if terminal else ""
    for number, (lines, left) in enumerate(rounds, start=1):
        text = "\n".join(lines)
        print(f"{up}{text}\nround {number}: {left} hidden", flush=True)


def _check(flags) -> None:
    """Raises InputError for values that are out of range."""
    for name, least in (("rounds", 1), ("top_k", 0), ("seed", 0)):
        if getattr(flags, name) < least:
            raise InputError(f"--{name} is {getattr(flags, name)}, and must be {least} or more")
    if not (math.isfinite(flags.temperature) and flags.temperature >= 0):
        raise InputError(f"--temperature is {flags.temperature}, and must be 0 or more")
    if flags.seed >= 2**32:
        raise InputError(f"--seed is {flags.seed}, and must be less than 2**32")


def _pair(name: str, text: str, least: int) -> tuple[int, int]:
    """Reads two numbers with a comma between them."""
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if not found or min(map(int, found.groups())) < least:
        raise InputError(f"{name} is {text!r}, and must be two numbers from {least} on, as in 7,5")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    cli.run(main)
