"""Checkpoints of a run: the last one and the best one, and the configuration beside them.

    workdir/config.json
    workdir/checkpoints/STEP/{state,batches,metrics}

A checkpoint gets its name only when it is whole, so that one cut off in the writing is never read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from terminator_jax.data.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training.state import TrainState


def accuracy(metrics: dict[str, float]) -> float:
    """By which pictures' checkpoints are compared."""
    return metrics["accuracy"]


class Checkpoints:
    """The checkpoints of a run; at most two are kept, that of the last step and the best one.

    Args:
        workdir: the directory of the run.
        read_only: nothing is to be written or removed.
        quality: of what an evaluation gave, the number that is largest for the best checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        read_only: bool = False,
        quality: Callable[[dict[str, float]], float] = accuracy,
    ):
        self._quality = quality
        self.directory = workdir.resolve() / "checkpoints"
        best = BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=quality,
            preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
            create=not read_only,
            read_only=read_only,
            # The next step uses the state's memory again: by then it must be written.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "batches")
        )

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, if there is one."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; the last of equals; None before any."""
        return self._manager.best_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints there are."""
        return sorted(self._manager.all_steps())

    def is_best(self, scores: dict[str, float]) -> bool:
        """Whether a checkpoint with these scores would be the best one."""
        best = self.best
        return best is None or self._quality(scores) >= self._quality(self.metrics(best))

    def metrics(self, step: int) -> dict[str, float]:
        """What the evaluation gave at this step; empty for one in the middle of an epoch."""
        return self._manager.metrics(step) or {}

    def save(
        self, step: int, state: TrainState, batches: dict[str, Any], scores: dict[str, float] | None
    ) -> None:
        """Writes a checkpoint and removes those that are neither the last nor the best.

        Args:
            step: its name.
            state: arrays over the devices of all processes, see `Parallel.whole`.
            batches: the position of the training batches, `get_state()` of their iterator.
            scores: what an evaluation gave; None in the middle of an epoch.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), batches=ocp.args.JsonSave(batches)
        )
        self._manager.save(step, args=items, metrics=scores, force=True)

    def restore(
        self, step: int, like: TrainState, sharding: jax.sharding.Sharding
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the position of the training batches, as they were saved.

        Args:
            step: which checkpoint.
            like: the shapes and dtypes of the state.
            sharding: where to put each array.

        Raises:
            InputError: if the checkpoint is of a state of another structure.
        """
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted), batches=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint of step {step} in {self.directory} does not fit this "
                "configuration, or is of another version of the package"
            ) from error
        return found.state, found.batches

    def close(self) -> None:
        """Gives up what the manager holds."""
        self._manager.close()


def config_file(workdir: Path) -> Path:
    """Where the configuration of a run is kept."""
    return workdir / "config.json"


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in `workdir`.

    Raises:
        InputError: if there is none, or it is of another version.
    """
    try:
        text = config_file(workdir).read_text()
    except OSError as error:
        raise InputError(f"{workdir} holds no run: {error.strerror}: {error.filename}") from error
    try:
        return configs.from_json(text)
    except ValueError as error:
        raise InputError(f"{config_file(workdir)}: {error}") from error


def latest_step(workdir: Path) -> int | None:
    """The step of the last whole checkpoint in `workdir`, if any; reads nothing but names."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError if `workdir` holds checkpoints of another configuration; writes nothing."""
    if latest_step(workdir) is None:
        return
    differing = configs.differences(read_config(workdir), config)
    if differing:
        raise InputError(
            f"{workdir} holds checkpoints of another configuration: {', '.join(differing)}: "
            "choose another --workdir, or the same fields"
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Keeps the configuration in `workdir`, which is created.

    Raises:
        InputError: if that cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        config_file(workdir).write_text(configs.to_json(config))
    except OSError as error:
        raise InputError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
