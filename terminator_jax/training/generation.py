"""Generates text with a trained model: a grid with a prompt, filled in rounds, and rendered."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.errors import InputError
from terminator_jax.models.decoding import decode
from terminator_jax.training.averages import PREFIX, averaged_parameters
from terminator_jax.training.checkpoint import read_beside_training, read_config
from terminator_jax.training.evaluation import open_checkpoint
from terminator_jax.training.freezing import trained_parameters
from terminator_jax.training.optimizer import make_optimizer
from terminator_jax.training.state import TrainState, new_state, ravel, split_model
from terminator_jax.training.tasks import MaskedTokens, make_task

# What is shown in place of a hidden byte, of the end of a line, and of what cannot be printed.
HIDDEN, NEWLINE, OTHER = "·", "↵", "?"


def load(workdir: Path, step: int | None = None) -> tuple[MaskedTokens, nnx.Module]:
    """Loads the task and the model of a run; its data need not be there.

    Args:
        workdir: the directory of the run.
        step: which checkpoint; None for the best.

    Raises:
        InputError: if there is no such run or checkpoint, or its model is not for text.
    """
    config = read_config(workdir)
    task = make_task(config)
    if not isinstance(task, MaskedTokens):
        raise InputError(f"{workdir} holds a {config.model.name}, which is not for text")
    tx, _ = make_optimizer(config, steps_per_epoch=1000)  # only the shapes of its state count
    model = task.make_model()
    trained = trained_parameters(model, config.freeze)
    model_def, params, model_state = split_model(model, trained)
    state = new_state(params, model_state, tx, config.seed)._replace(params=params)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def restore() -> TrainState:
        checkpoints, chosen = open_checkpoint(workdir, step, task)
        return checkpoints.restore(chosen, state, sharding)[0]

    state = read_beside_training(workdir, restore)
    params = state.params
    if task.best_metric.startswith(PREFIX):
        averages = averaged_parameters(ravel(params), state.opt_state, config.ema_decay)
        params = model_def.unravel(averages)
    model = model_def.merge(params, state.model_state)
    model.eval()
    return task, model


def prompt_grid(
    grid: tuple[int, int], prompt: str = "", at: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a grid with a prompt in it, and what is hidden: all the rest.

    Args:
        grid: rows and columns.
        prompt: its UTF-8 bytes follow each other, and continue in the next row.
        at: row and column of the first byte.

    Raises:
        InputError: if the prompt does not fit there, or leaves nothing to fill in.

    Example:
        >>> tokens, hidden = prompt_grid((2, 4), "abc", at=(0, 3))
        >>> render(tokens, hidden)
        ['···a', 'bc··']
    """
    rows, columns = grid
    if not (0 <= at[0] < rows and 0 <= at[1] < columns):
        raise InputError(
            f"--at is {at[0]},{at[1]}, and the grid has {rows} rows and {columns} columns"
        )
    data = np.frombuffer(prompt.encode(errors="surrogateescape"), np.uint8)
    first, cells = at[0] * columns + at[1], rows * columns
    if first + len(data) > cells:
        raise InputError(
            f"the prompt has {len(data)} bytes, and from --at={at[0]},{at[1]} on the grid has"
            f" {cells - first}"
        )
    if len(data) == cells:
        raise InputError("the prompt fills the whole grid: choose a larger --grid")
    tokens, hidden = np.zeros(cells, np.int32), np.ones(cells, bool)
    tokens[first : first + len(data)], hidden[first : first + len(data)] = data, False
    return tokens.reshape(grid), hidden.reshape(grid)


def fill(
    model: nnx.Module,
    tokens: np.ndarray,
    hidden: np.ndarray,
    *,
    rounds: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tokens of grids, `(n, rows, columns)`, and what is hidden after each round.

    See `decode`.
    """
    return decode(
        functools.partial(_logits, *nnx.split(model)),
        jnp.asarray(tokens),
        jnp.asarray(hidden),
        mask_token=model.config.mask_token,
        rounds=rounds,
        temperature=temperature,
        top_k=top_k,
        key=jax.random.key(seed),
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(tokens)


def render(tokens: np.ndarray, hidden: np.ndarray) -> list[str]:
    """Renders the rows of a grid as text, one character a byte.

    Example:
        >>> render(np.array([[104, 105, 10, 200]]), np.array([[False, False, False, False]]))
        ['hi↵?']
    """
    return [
        "".join(
            HIDDEN if covered else _character(token) for token, covered in zip(*row, strict=True)
        )
        for row in zip(np.asarray(tokens), np.asarray(hidden), strict=True)
    ]


def _character(token: int) -> str:
    if token == ord("\n"):
        return NEWLINE
    return chr(token) if 32 <= token < 127 else OTHER
