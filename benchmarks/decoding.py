"""What the number of rounds does to texts that a non-linear transformer generates.

    python benchmarks/decoding.py runs/shakespeare2d    # writes a section of docs/results.md

First the loss on evaluation text by the share of bytes hidden, beside baselines at the same bytes.
Then grids are filled from nothing in more and more rounds. Beside the seconds that takes, their
text is judged by frequencies in the training text, how well bytes follow one another (the bigram's
nats per byte) and which share of the words occurs there, and by the model, which predicts a random
half of each grid from the other. Evaluation text stands below for comparison.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import report

from terminator_jax.data import ngrams
from terminator_jax.data.text import Text
from terminator_jax.training import evaluation, generation

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
ROUNDS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = (1, 8, 64)  # rounds whose first grid is printed
OPTIONS = dict(temperature=0.8, top_k=0, seed=0)
PROMPT, AT_ROW, AT_COLUMN = "the king", 3, 12


def losses(workdir: Path) -> str:
    """A table of losses by the share of bytes hidden."""
    rows = []
    for share in SHARES:
        found = evaluation.evaluate_checkpoint(workdir, overrides=[f"--config.data.hidden={share}"])
        scores = {**found.baselines, **found.scores}
        numbers = [scores[name] for name in ("unigram", "bigram", "loss")]
        rows.append([f"{share:.0%}", *(f"{x:.3f}" for x in numbers), f"{scores['accuracy']:.1%}"])
        print(*rows[-1], sep=" | ", flush=True)
    head = ["hidden", "unigram, nats", "bigram told the byte before", "model", "its hits"]
    return report.table(head, rows)


class Judge:
    """Numbers of texts on grids, by a training text and by a model."""

    def __init__(self, task, model, train: Text):
        self._task, self._model = task, model
        self._ngrams, self._words = ngrams.count(train.data), set(words(train.data))

    def __call__(self, grids: np.ndarray) -> list[str]:
        """The bigram's nats, the share of words known, the model's nats at a half of the bytes."""
        texts = [grid.astype(np.uint8).ravel() for grid in grids]
        bigram = np.mean([self._ngrams.entropy(text)[1] for text in texts])
        found = [word for text in texts for word in words(text)[1:-1]]
        known = np.mean([word in self._words for word in found])
        mask = np.ones(len(grids), bool)
        batch = {"tokens": grids, "index": np.arange(len(grids)), "mask": mask}
        sums = self._task.eval_step(self._model, batch)
        own = float(sums["loss"]) / float(sums["count"])
        return [f"{bigram:.3f}", f"{known:.0%}", f"{own:.3f}"]


def words(data: np.ndarray) -> list[bytes]:
    """The words of a text, in small letters."""
    return re.findall(rb"[a-z']+", data.tobytes().lower())


def grid_of(tokens: np.ndarray) -> str:
    """A grid as a block of a page."""
    lines = generation.render(tokens, np.zeros(tokens.shape, bool))
    return "\n".join(["```", *lines, "```"])


def rounds_table(task, model, judge: Judge, real: Text, count: int) -> tuple[str, list[str]]:
    """A row for each number of rounds and one for real text, and some of the grids."""
    grid, rows, shown = task.config.data.grid, [], []
    tokens, hidden = (np.broadcast_to(x, (count, *grid)) for x in generation.prompt_grid(grid))
    for _ in generation.fill(model, tokens, hidden, rounds=2, **OPTIONS):
        pass  # compiles
    for rounds in ROUNDS:
        start = time.perf_counter()
        *_, (filled, _) = generation.fill(model, tokens, hidden, rounds=rounds, **OPTIONS)
        seconds = (time.perf_counter() - start) / count
        rows.append([str(rounds), f"{seconds:.2f}", *judge(filled)])
        print(*rows[-1], sep=" | ", flush=True)
        if rounds in SHOWN:
            shown.append(f"In {rounds} round{'s' * (rounds > 1)}:\n\n{grid_of(filled[0])}")
    whole = real.read(np.arange(min(count, len(real))))["tokens"]
    rows.append(["evaluation text", "–", *judge(whole.astype(np.int32))])
    print(*rows[-1], sep=" | ", flush=True)
    head = ["rounds", "seconds a grid", "bigram, nats", "words known", "model, nats"]
    return report.table(head, rows), shown


def prompted(task, model) -> str:
    """A grid around a prompt."""
    grid = task.config.data.grid
    at = (min(AT_ROW, grid[0] - 2), min(AT_COLUMN, grid[1] - 1))
    tokens, hidden = generation.prompt_grid(grid, PROMPT, at)
    *_, (filled, _) = generation.fill(model, tokens[None], hidden[None], rounds=64, **OPTIONS)
    return f"In 64 rounds around “{PROMPT}”, given at {at[0]},{at[1]}:\n\n{grid_of(filled[0])}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, help="of a run of experiments/shakespeare2d.py")
    parser.add_argument("--count", type=int, default=16, help="grids for each number of rounds")
    parser.add_argument("--dry", action="store_true", help="writes nothing")
    flags = parser.parse_args()
    task, model = generation.load(flags.workdir)
    data = task.config.data
    train, real = (task.open(split) for split in (data.train_split, data.eval_split))
    judge = Judge(task, model, train)
    by_share = losses(flags.workdir)
    by_rounds, shown = rounds_table(task, model, judge, real, flags.count)
    parts = [
        report.conditions(f"python benchmarks/decoding.py {flags.workdir}"), by_share,
        f"Grids of {data.grid[0]}×{data.grid[1]} from nothing, {flags.count} for each row,"
        f" temperature {OPTIONS['temperature']}:",
        by_rounds, *shown, prompted(task, model),
    ]  # fmt: skip
    print(*parts[-len(shown) - 1 :], sep="\n\n")
    if not flags.dry:
        report.write_section("decoding", "\n\n".join(parts), PAGE)


if __name__ == "__main__":
    main()
