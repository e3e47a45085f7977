"""Variables that had other names in the files of earlier versions."""

from flax import nnx

Path = tuple[str | int, ...]
# The end of a variable's path: before, and now.
RENAMED: dict[Path, Path] = {
    ("local", "slow_nets", "averages", "pooled"): ("local", "context", "mean"),
    ("local", "slow_nets", "averages", "count"): ("local", "context", "count"),
}


def current_path(path: Path) -> Path:
    """Returns the path that a variable has now.

    Example:
      >>> current_path(("blocks", 0, "local", "slow_nets", "averages", "pooled"))
      ('blocks', 0, 'local', 'context', 'mean')
    """
    return _replace_end(path, RENAMED)


def with_current_names(state: nnx.State) -> nnx.State:
    """Renames the variables of a state that has the names of an earlier version."""
    return _renamed(state, RENAMED)


def with_old_names(state: nnx.State) -> nnx.State:
    """Renames the variables of a state to what they were called before."""
    return _renamed(state, {now: before for before, now in RENAMED.items()})


def _renamed(state: nnx.State, table: dict[Path, Path]) -> nnx.State:
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(_replace_end(path, table), leaf) for path, leaf in flat])


def _replace_end(path: Path, table: dict[Path, Path]) -> Path:
    for end, other in table.items():
        if path[-len(end) :] == end:
            return (*path[: -len(end)], *other)
    return path
