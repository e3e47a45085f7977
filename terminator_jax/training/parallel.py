"""The devices of a run: `pmap`, or `jit` of the whole batch over a mesh; in one process or several.

Either way the state is the same on every device, and a batch is divided into as many equal parts as
there are devices.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from terminator_jax.data.augment import Process
from terminator_jax.errors import InputError

AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Runs steps on all devices.

    Attributes:
        mesh: all devices, in the order in which they take their part of a batch.
        axis_name: the mapped axis that a step sees, if any.
    """

    mesh: Mesh
    axis_name: ClassVar[str | None] = None

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Returns `step(state, batch)` for all devices; its results are the same on each.

        Args:
            step: what each device computes (`pmap`), or all of them together (`jit`).
            donate: whether the memory of `state` is used again for the results.
        """
        raise NotImplementedError

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns this process's rows of a batch, divided for the compiled step."""
        raise NotImplementedError

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that are the same on every device."""
        return NamedSharding(self.mesh, P())

    def replicate(self, tree: Any) -> Any:
        """Returns arrays, which every process has alike, on every device."""
        return jax.device_put(tree, self.replicated)

    def to_global(self, state: Any) -> Any:
        """Returns the state as arrays over the devices of all processes, for a checkpoint."""
        if jax.process_count() == 1:
            return state
        return multihost_utils.host_local_array_to_global_array(state, self.mesh, P())


class PmapParallel(Parallel):
    """Runs the step of each device on its own rows of the batch."""

    axis_name = AXIS

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Returns the mapped step.

        The state has no device axis: it goes in as one replicated array and comes out as one, so
        that checkpoints and both modes see the same arrays.
        """
        return jax.pmap(
            step,
            AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=list(self.mesh.devices),
            donate_argnums=(0,) if donate else (),
        )

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays with a leading axis of this process's devices."""
        devices = len(self.mesh.local_devices)
        return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


class JitParallel(Parallel):
    """Runs one program of the whole batch, which the compiler divides among the devices."""

    @property
    def _rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(AXIS))

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Returns the step with the shardings of its arguments."""
        return jax.jit(
            step,
            in_shardings=(self.replicated, self._rows),
            out_shardings=self.replicated,
            donate_argnums=(0,) if donate else (),
        )

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns global arrays, of which this process gives its own rows."""
        return {
            name: jax.make_array_from_process_local_data(self._rows, x) for name, x in batch.items()
        }


MODES: dict[str, type[Parallel]] = {"pmap": PmapParallel, "jit": JitParallel}


def make_parallel(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """Returns the devices, to be used as `config.parallel` says.

    Args:
        config: as `config.read` gives it.
        devices: by default all there are.

    Raises:
        InputError: if a batch cannot be cut into as many equal parts as there are devices.
    """
    devices = devices or _all_devices()
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    for field in ("batch_size", "eval_batch_size"):
        if config[field] % len(devices):
            raise InputError(
                f"config.{field} is {config[field]}, and must be a multiple of the number of "
                f"devices, {len(devices)} ({jax.process_count()} processes)"
            )
    return MODES[config.parallel](Mesh(np.array(devices), (AXIS,)))


def _all_devices() -> list[jax.Device]:
    """Returns all devices; raises InputError if the platform asked for has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that one platform starts
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: unset "
            "it, or install the package of that platform"
        ) from error


def process_shard() -> Process:
    """Returns which part of each batch this process makes."""
    return Process(jax.process_index(), jax.process_count())
