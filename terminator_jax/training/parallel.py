"""The devices of a run: `pmap`, or `jit` of the whole batch over a mesh; in one process or several.

Either way the state is one array per leaf, the same on every device, and a batch is cut into as
many equal parts as there are devices.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from terminator_jax.data.augment import Process
from terminator_jax.data.errors import InputError

AXIS = "batch"

# Seconds that a process waits for process 0 to listen.
PATIENCE = 300


class Parallel(NamedTuple):
    """How steps run on all devices.

    Attributes:
        mesh: all devices, in the order in which they take their part of a batch.
        axis_name: the mapped axis that a step sees, if any.
        compile: makes `step(state, batch)` run on all devices, its results the same on each. With
            `donate`, the memory of `state` is used again for the results.
        place: this process's rows of a batch, cut up for the compiled step.
    """

    mesh: Mesh
    axis_name: str | None
    compile: Callable[..., Callable]
    place: Callable[[dict[str, np.ndarray]], dict[str, Any]]

    @property
    def replicated(self) -> NamedSharding:
        """Of arrays that are the same on every device."""
        return NamedSharding(self.mesh, P())

    def replicate(self, tree: Any) -> Any:
        """Arrays that every process has alike, on every device."""
        return jax.device_put(tree, self.replicated)

    def whole(self, state: Any) -> Any:
        """The state as arrays over the devices of all processes, as checkpoints need it."""
        return multihost_utils.host_local_array_to_global_array(state, self.mesh, P())


def _pmap(mesh: Mesh) -> Parallel:
    devices = len(mesh.local_devices)

    def compile(step: Callable, *, donate: bool = False) -> Callable:
        given = (0,) if donate else ()
        return jax.pmap(
            step,
            AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=list(mesh.devices),
            donate_argnums=given,
        )

    def place(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}

    return Parallel(mesh, AXIS, compile, place)


def _jit(mesh: Mesh) -> Parallel:
    same, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))

    def compile(step: Callable, *, donate: bool = False) -> Callable:
        given = (0,) if donate else ()
        return jax.jit(step, in_shardings=(same, cut), out_shardings=same, donate_argnums=given)

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(cut, x) for name, x in batch.items()}

    return Parallel(mesh, None, compile, place)


MODES = {"pmap": _pmap, "jit": _jit}


def make_parallel(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """The devices, to be used as `config.parallel` says.

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
    """Every device there is; raises InputError if the platform asked for has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that one platform starts
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: unset "
            "it, or install the package of that platform"
        ) from error


def own_process() -> Process:
    """The part of each batch that this process makes."""
    return Process(jax.process_index(), jax.process_count())


def connect(coordinator: str | None, num_processes: int, process_id: int) -> None:
    """Joins the processes of a run; to be called before anything else of JAX.

    Args:
        coordinator: `host:port`, at which process 0 listens.
        num_processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        InputError: if the number of this process is impossible, or the coordinator is not given
            or not reached.
    """
    if not coordinator:
        raise InputError("--num_processes needs --coordinator=HOST:PORT, where process 0 listens")
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process_id is {process_id}, and must be from 0 to {num_processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator is {coordinator!r}, and must be HOST:PORT")
    if process_id != 0:
        _wait_for(host, int(port))
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _wait_for(host: str, port: int) -> None:
    """Waits until process 0 listens: if it never does, JAX itself would abort the process."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                raise InputError(f"no process 0 at --coordinator={host}:{port}: {error}") from error
        time.sleep(0.2)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any of the processes; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
