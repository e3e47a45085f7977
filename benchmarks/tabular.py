"""TabularTerminator beside scikit-learn's own models, on tables that come with scikit-learn.

    python benchmarks/tabular.py    # writes a section of docs/results.md, three minutes

Five folds, the same for all. The networks' learning rate is chosen anew for each fold, by
cross-validation within the rows that train: the rows that test have no part in it. Networks of all
folds, rates and seeds train together in one program.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from sklearn import datasets
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from terminator_jax.models import TabularConfig, TabularTerminator

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
SETS = {
    "breast cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
}
FOLDS, INNER_FOLDS = 5, 3
SEEDS = 4
# What is chosen for each fold: how fast, and with so few steps how far, a network learns.
RATES = (1e-3, 3e-3, 1e-2)
STEPS, WARMUP, BATCH = 200, 20, 32
DROPOUT, WEIGHT_DECAY = 0.2, 0.1


class Table(NamedTuple):
    """Rows `x`, what is known of them `y`, and the number of classes, None for regression."""

    x: np.ndarray
    y: np.ndarray
    classes: int | None


def table_named(name: str) -> Table:
    """One of `SETS`."""
    data = SETS[name]()
    classes = len(data.target_names) if "target_names" in data else None
    return Table(data.data, data.target, classes)


def folds(table: Table, count: int, rows: np.ndarray, seed: int) -> list[np.ndarray]:
    """For each fold, which of the table's rows train, all of them among `rows`."""
    kind = KFold if table.classes is None else StratifiedKFold
    split = kind(count, shuffle=True, random_state=seed).split(rows, table.y[rows])
    masks = np.zeros((count, len(table.y)), bool)
    for mask, (train, _) in zip(masks, split, strict=True):
        mask[rows[train]] = True
    return list(masks)


def score(table: Table, rows: np.ndarray, found: np.ndarray) -> float:
    """Accuracy or R² of classes or numbers found for some rows."""
    y = table.y[rows]
    if table.classes is None:
        return 1 - np.mean((found - y) ** 2) / np.var(y)
    return np.mean(found == y)


# The networks.


def batches(masks: np.ndarray) -> np.ndarray:
    """Rows of every step, `(masks, seeds, steps, batch)`, drawn from those that train."""
    rng = np.random.default_rng(0)
    drawn = [
        rng.choice(np.flatnonzero(mask), BATCH, replace=False)
        for mask in masks
        for _ in range(SEEDS * STEPS)
    ]
    return np.reshape(drawn, (len(masks), SEEDS, STEPS, BATCH))


def standardized(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The columns by the statistics of each mask's rows, `(masks, rows, columns)`."""
    means = np.stack([values[mask].mean(0) for mask in masks])[:, None]
    deviations = np.stack([values[mask].std(0) for mask in masks])[:, None]
    return ((values - means) / np.maximum(deviations, 1e-9)).astype(np.float32)


def train(config: TabularConfig, x, y, batches, rate, key) -> jax.Array:
    """What a network gives for all rows, trained on those of `batches`."""
    start, drop = jax.random.split(key)
    graph, params = nnx.split(TabularTerminator(config, rngs=nnx.Rngs(start)), nnx.Param)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, WARMUP, STEPS)
    optimizer = optax.adamw(lambda n: rate * schedule(n), weight_decay=WEIGHT_DECAY)

    def loss(params, rows, key):
        out = nnx.merge(graph, params)(x[rows], rngs=nnx.Rngs(dropout=key))
        if config.num_classes is None:
            return jnp.mean(optax.squared_error(out, y[rows]))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y[rows]))

    def step(carry, inputs):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *inputs), state, params)
        return (optax.apply_updates(params, updates), state), None

    inputs = batches, jax.random.split(drop, STEPS)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), inputs)
    return nnx.merge(graph, params)(x)


@functools.partial(jax.jit, static_argnums=0)
def train_all(config: TabularConfig, x, y, batches, rates, keys) -> jax.Array:
    """`(masks, rates, seeds, rows, outputs)` of as many networks."""
    one = functools.partial(train, config)
    seeds = jax.vmap(one, (None, None, 0, None, 0))
    both = jax.vmap(seeds, (None, None, None, 0, None))
    return jax.vmap(both, (0, 0, 0, None, None))(x, y, batches, rates, keys)


def outputs(table: Table, masks: np.ndarray) -> np.ndarray:
    """Probabilities of classes, or numbers, of `train_all`'s networks."""
    config = TabularConfig(table.x.shape[1], num_classes=table.classes, dropout=DROPOUT)
    if table.classes is None:
        y = standardized(table.y[:, None], masks)
    else:
        y = np.broadcast_to(table.y, masks.shape)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    x, rates = standardized(table.x, masks), jnp.array(RATES)
    found = train_all(config, x, y, batches(masks), rates, keys)
    if table.classes is not None:
        return np.asarray(jax.nn.softmax(found))
    means, deviations = (
        np.array([f(table.y[mask]) for mask in masks]).reshape(-1, 1, 1, 1, 1)
        for f in (np.mean, np.std)
    )
    return np.asarray(found) * deviations + means


def predicted(table: Table, found: np.ndarray) -> np.ndarray:
    """Classes, or numbers, from `(rows, outputs)`."""
    return found[:, 0] if table.classes is None else np.argmax(found, 1)


def network_scores(table: Table, outer: list[np.ndarray]) -> tuple[list[float], list[float], list]:
    """Of each fold: the score of the mean of the networks, their mean score, the learning rate."""
    inner = [folds(table, INNER_FOLDS, np.flatnonzero(mask), seed=1) for mask in outer]
    masks = np.array([[mask, *within] for mask, within in zip(outer, inner, strict=True)])
    found = outputs(table, masks.reshape(-1, masks.shape[-1]))
    found = found.reshape(len(outer), INNER_FOLDS + 1, *found.shape[1:])
    together, alone, chosen = [], [], []
    for fold, (mask, *within) in enumerate(masks):
        by_rate = [
            np.mean(
                [
                    score(table, mask & ~m, predicted(table, one.mean(0)[mask & ~m]))
                    for m, one in zip(within, found[fold, 1:, n], strict=True)
                ]
            )
            for n in range(len(RATES))
        ]
        best = int(np.argmax(by_rate))
        seeds = found[fold, 0, best][:, ~mask]
        together.append(score(table, ~mask, predicted(table, seeds.mean(0))))
        alone.append(np.mean([score(table, ~mask, predicted(table, one)) for one in seeds]))
        chosen.append(RATES[best])
    return together, alone, chosen


# scikit-learn's models, as they come.


def baselines(table: Table) -> dict[str, object]:
    """By name."""
    if table.classes is None:
        return {
            "gradient boosting": GradientBoostingRegressor(random_state=0),
            "linear: ridge or logistic regression": make_pipeline(StandardScaler(), Ridge()),
        }
    return {
        "gradient boosting": GradientBoostingClassifier(random_state=0),
        "linear: ridge or logistic regression": make_pipeline(
            StandardScaler(), LogisticRegression()
        ),
    }


def baseline_scores(table: Table, model, outer: list[np.ndarray]) -> list[float]:
    """Of each fold."""
    return [
        score(table, ~mask, model.fit(table.x[mask], table.y[mask]).predict(table.x[~mask]))
        for mask in outer
    ]


# The table of results.


def column(name: str) -> dict[str, list[float]]:
    """Scores of every model on one set, by fold."""
    table = table_named(name)
    outer = folds(table, FOLDS, np.arange(len(table.y)), seed=0)
    start = time.perf_counter()
    together, alone, chosen = network_scores(table, outer)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s of networks; chosen: {chosen}", flush=True)
    scores = {f"`TabularTerminator`, {SEEDS} together": together, "`TabularTerminator`": alone}
    for model_name, model in baselines(table).items():
        scores[model_name] = baseline_scores(table, model, outer)
    print({model: shown(name, found) for model, found in scores.items()}, flush=True)
    return scores


def shown(name: str, scores: list[float]) -> str:
    """Mean ± standard deviation over the folds: accuracy in percent, or R²."""
    scale, digits = (1, 3) if SETS[name] is datasets.load_diabetes else (100, 1)
    return f"{scale * np.mean(scores):.{digits}f} ± {scale * np.std(scores):.{digits}f}"


def main() -> None:
    """Trains, prints and writes."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    start = time.perf_counter()
    columns = {name: column(name) for name in SETS}
    rows = [
        [model, *(shown(name, scores[model]) for name, scores in columns.items())]
        for model in next(iter(columns.values()))
    ]
    head = ["", *(f"{name}, {'R²' if name == 'diabetes' else 'accuracy, %'}" for name in SETS)]
    text = report.table(head, rows)
    print(text)
    seconds = time.perf_counter() - start
    conditions = f"{report.conditions('python benchmarks/tabular.py')} {seconds:.0f} s in all."
    report.write_section("tabular", f"{conditions}\n\n{text}", PAGE)


if __name__ == "__main__":
    main()
