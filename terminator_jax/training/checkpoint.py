"""Keeps checkpoints of a run, the last and the best, and the configuration beside them.

    workdir/config.json
    workdir/checkpoints/STEP/{state,batches,metrics}

A checkpoint gets its name only when it is whole: one whose writing was cut off is never read.
"""

import concurrent.futures
import contextlib
import errno
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

from terminator_jax.errors import InputError, cannot_write, is_full, one_line
from terminator_jax.renamed import with_current_names, with_old_names
from terminator_jax.training import config as configs
from terminator_jax.training import integrity, provenance
from terminator_jax.training.history import quality
from terminator_jax.training.lock import one_writer
from terminator_jax.training.paths import replace_text
from terminator_jax.training.state import TrainState

T = TypeVar("T")
# How often a checkpoint is chosen beside a training that removes them.
READ_ATTEMPTS = 10


class Checkpoints:
    """Keeps the checkpoints of a run: those of the last step and the best one, and more if asked.

    Args:
        workdir: the directory of the run.
        best_metric: the metric of an evaluation that decides which is the best: the smallest
            `loss`, or the largest of another metric.
        keep_every_steps: also those of every so many steps are kept; 0 for none.
        read_only: whether nothing is to be written or removed.

    Raises:
        InputError: if the files beside the arrays of a checkpoint are damaged.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        best_metric: str = "accuracy",
        keep_every_steps: int = 0,
        read_only: bool = False,
    ):
        self._quality = functools.partial(quality, best_metric)
        self.directory = workdir.resolve() / "checkpoints"
        best = BestN(get_metric_fn=self._quality, n=1, keep_checkpoints_without_metrics=False)
        policies = [LatestN(1), best]
        if keep_every_steps:
            policies.append(EveryNSteps(keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            best_fn=self._quality,
            preservation_policy=AnyPreservationPolicy(policies),
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "batches")
            )
        except (OSError, OverflowError, ValueError) as error:
            # Orbax computes with the times that it finds, whatever a damaged file says. What else
            # the system says is no damage: a full disk must not lead to removing a checkpoint.
            if isinstance(error, OSError) and error.errno != errno.EOVERFLOW:
                raise
            raise InputError(
                f"a checkpoint in {self.directory} is damaged ({one_line(error)}): remove it"
            ) from error
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future | None = None

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; None before any."""
        self.wait()
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; the last of equals; None before any."""
        self.wait()
        return self._manager.best_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    def is_best(self, scores: dict[str, float]) -> bool:
        """Returns whether a checkpoint with these scores would be the best one."""
        best = self.best
        return best is None or self._quality(scores) >= self._quality(self.metrics(best))

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the scores of a checkpoint; empty for one in the middle of an epoch."""
        return self._manager.metrics(step) or {}

    def save(
        self, step: int, state: TrainState, batches: dict[str, Any], scores: dict[str, float] | None
    ) -> None:
        """Begins to write a checkpoint, and waits only for the one before.

        Those that are not to be kept are removed when it is whole.

        Args:
            step: the number of steps done, which names it.
            state: arrays over the devices of all processes, see `Parallel.to_global`, whose memory
                nothing uses again.
            batches: the position of the training batches, `get_state()` of their iterator.
            scores: the result of an evaluation; None in the middle of an epoch.

        Raises:
            InputError: if it, or the one before, cannot be written.
        """
        self.wait()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_to_disk(state)), batches=ocp.args.JsonSave(batches)
        )
        with self._explained():
            if jax.process_index() == 0:
                integrity.forget(self.directory, step)
            self._manager.save(step, args=items, metrics=scores, force=True)
        self._saving = self._thread.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until what is being saved is whole.

        Raises:
            InputError: if it cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving:
            with self._explained():
                saving.result()

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            integrity.write(self.directory, step)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises what the system says of a disk as InputError, and removes what is not whole."""
        try:
            yield
        except Exception as error:  # orbax passes on what its storage libraries raise
            full = is_full(error)
            if not full and not isinstance(error, OSError):
                raise
            for partial in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
            system = OSError(errno.ENOSPC, "") if full else error
            raise cannot_write(f"a checkpoint in {self.directory}", system) from error

    def restore(
        self, step: int, abstract_state: TrainState, sharding: jax.sharding.Sharding
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads the state and the position of the training batches.

        Args:
            step: which checkpoint.
            abstract_state: the shapes and dtypes of the state; arrays will do.
            sharding: where to put each array.

        Returns:
            The state, and the position. A checkpoint of a version that kept no running averages
            gives a state whose `model_state` is empty.

        Raises:
            InputError: if the checkpoint is of a state of another structure.
        """
        model_state = abstract_state.model_state
        if not jax.tree.leaves(model_state):
            return self._restore(step, abstract_state, sharding)
        for names in (model_state, with_old_names(model_state)):
            with contextlib.suppress(InputError):
                state, batches = self._restore(
                    step, abstract_state._replace(model_state=names), sharding
                )
                return state._replace(model_state=with_current_names(state.model_state)), batches
        return self._restore(step, abstract_state._replace(model_state={}), sharding)

    def _restore(
        self, step: int, abstract_state: TrainState, sharding: jax.sharding.Sharding
    ) -> tuple[TrainState, dict[str, Any]]:
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            _to_disk(abstract_state),
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted), batches=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:  # whatever damaged files make orbax raise
            raise InputError(
                f"the checkpoint of step {step} in {self.directory} does not fit this "
                "configuration, is damaged, or is of another version of the package"
            ) from error
        return _from_disk(found.state), found.batches

    def close(self) -> None:
        """Waits for what is being saved, and ends the threads that save."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with self._explained():  # it raises once more what a save raised
                self._manager.close()


def _to_disk(state: TrainState) -> dict[str, Any]:
    """Returns the state under the names that checkpoints of every version have."""
    items = state._asdict()
    return {"other": items.pop("model_state"), **items}


def _from_disk(items: dict[str, Any]) -> TrainState:
    return TrainState(model_state=items.pop("other"), **items)


def config_file(workdir: Path) -> Path:
    """Returns the file that holds the configuration of a run."""
    return workdir / "config.json"


def read_config(workdir: Path) -> ConfigDict:
    """Reads the configuration of the run in `workdir`.

    Raises:
        InputError: if there is none, or it is of another version.
    """
    try:
        content = config_file(workdir).read_bytes()
    except OSError as error:
        raise InputError(f"{workdir} holds no run: {error.strerror}: {error.filename}") from error
    try:
        return configs.from_json(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{config_file(workdir)}: {error}") from error


def latest_step(workdir: Path) -> int | None:
    """Returns the step of the last whole checkpoint, if any; reads nothing but names."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=None)


def read_beside_training(workdir: Path, read: Callable[[], T]) -> T:
    """Returns what `read` reads of the checkpoints, and reads again if they change meanwhile.

    Training removes checkpoints: what was chosen, or a part of it, may be gone when it is read.

    Args:
        workdir: the directory of the run.
        read: chooses a checkpoint and reads it.
    """
    for _ in range(READ_ATTEMPTS):
        before = _names(workdir)
        try:
            return read()
        except (InputError, OSError):
            time.sleep(0.2)  # a checkpoint is removed file by file
            if _names(workdir) == before:
                raise
    return read()


def _names(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("*")}


def set_damaged_aside(workdir: Path) -> list[str]:
    """Moves the newest checkpoints away as long as they are damaged.

    What is damaged among the older ones stays where it is, and is not read.

    Returns:
        A line to be printed for each.

    Raises:
        InputError: if one cannot be moved, or if another process may be writing it.
    """
    if not _damage(workdir)[1]:
        return []  # without the lock, which cannot be written where a disk can only be read
    lines, directory = [], workdir.resolve() / "checkpoints"
    with one_writer(workdir):
        while True:
            step, problem = _damage(workdir)
            if not problem:
                return lines
            try:
                place = integrity.set_aside(directory, step)
            except OSError as error:
                raise InputError(
                    f"the checkpoint of step {step} in {directory} {problem}, and cannot be moved "
                    f"away: {error.strerror}"
                ) from error
            lines.append(f"the checkpoint of step {step} {problem}: it was moved to {place}")


def _damage(workdir: Path) -> tuple[int, str]:
    """Returns the newest checkpoint's step and what is wrong with it; "" if nothing is."""
    step = latest_step(workdir)
    if step is None:
        return 0, ""
    return step, integrity.problem(workdir.resolve() / "checkpoints", step)


def check_workdir(
    workdir: Path, config: ConfigDict, known: provenance.Provenance | None = None
) -> ConfigDict | None:
    """Checks that a run with this configuration can go on in `workdir`; writes nothing.

    A `config.json` that is missing or broken is said on stderr and taken for `config`; a checkpoint
    that does not fit it is refused when it is read.

    Args:
        workdir: the directory of the run.
        config: the configuration.
        known: what is known of the run's data, which may lie elsewhere now.

    Returns:
        The configuration of the checkpoints that are there; None if there are none.

    Raises:
        InputError: if they are of another configuration.
    """
    if latest_step(workdir) is None:
        return None
    try:
        saved = read_config(workdir)
    except InputError as error:
        print(f"warning: {error}: it is written again as --config says", file=sys.stderr)
        return config
    differing = configs.differences(saved, config)
    if provenance.is_same(saved, config, known):
        differing.pop("data.name", None)
    if differing:
        listed = ", ".join(f"{path} ({values})" for path, values in differing.items())
        raise InputError(
            f"{workdir} holds checkpoints of another configuration: {listed}: "
            "choose another --workdir, or the same fields"
        )
    return saved


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the configuration into `workdir`, which exists.

    Raises:
        InputError: if that cannot be written.
    """
    try:
        replace_text(config_file(workdir), configs.to_json(config))
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error
