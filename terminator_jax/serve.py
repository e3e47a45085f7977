"""Batches inference requests from many threads.

    from terminator_jax.serve import Session

    with Session("runs/digits") as session:  # compiles first
        ticket = session.send_data(pictures)  # uint8, (n, 8, 8, 1); returns at once
        logits = session.receive_data(ticket, timeout=10.0)

The rows of a batch must not depend on each other, as is so for a model after `eval()`.
"""

import collections
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.layers.slow_fast import SlowFast
from terminator_jax.loading import LoadedModel, load_model

Ticket = Future


class Served(NamedTuple):
    """What a session computes.

    Attributes:
        function: of `state` and data `(n, *shape)`, pure; gives arrays whose first axis is n, one
            or a tree of them.
        state: what the function computes with, such as a model's variables.
        shape: of one piece of data, such as a picture's height, width and channels.
        dtype: of the data.
    """

    function: Callable[[Any, jax.Array], Any]
    state: Any
    shape: tuple[int, ...]
    dtype: np.dtype


class Request(NamedTuple):
    """Data `(n, *shape)`, and where its result goes."""

    data: np.ndarray
    ticket: Ticket


class Session:
    """Collects requests for a moment, computes them together and gives each its own result.

    One thread computes; any number may call `send_data` and `receive_data`. A session is a context
    manager, which starts and stops it.

    Args:
        model: the directory of a run or its file `model.safetensors`, what `load_model` returns, or
            `Served`.
        max_batch: how many pictures are computed at once at most.
        max_delay: seconds that a request waits for others at most.
        dtype: of a loaded model's pictures, uint8 or uint16.

    Raises:
        ValueError: for limits out of range, or where there is no model for pictures.

    Example:
        >>> double = Served(lambda two, x: two * x, 2.0, shape=(3,), dtype=np.dtype(np.float32))
        >>> with Session(double, max_batch=4) as session:
        ...     tickets = [session.send_data(np.full((1, 3), n, np.float32)) for n in (1, 2)]
        ...     [session.receive_data(ticket).tolist() for ticket in tickets]
        [[[2.0, 2.0, 2.0]], [[4.0, 4.0, 4.0]]]
    """

    def __init__(
        self,
        model: str | os.PathLike | LoadedModel | Served,
        *,
        max_batch: int = 64,
        max_delay: float = 0.002,
        dtype=np.uint8,
    ):
        if not (isinstance(max_batch, int) and max_batch > 0):
            raise ValueError(f"max_batch is {max_batch}, and must be a whole number, 1 or more")
        if not 0 <= max_delay <= threading.TIMEOUT_MAX:  # which NaN is not either
            raise ValueError(f"max_delay is {max_delay}, and must be seconds, 0 or more")
        served = model if isinstance(model, Served) else _served(model, np.dtype(dtype))
        self.served = served._replace(shape=tuple(served.shape), dtype=np.dtype(served.dtype))
        if jax.dtypes.canonicalize_dtype(served.dtype) != served.dtype:
            raise ValueError(f"data of {self.served.dtype} need JAX_ENABLE_X64=1")
        self.max_batch, self.max_delay = max_batch, max_delay
        # Powers of two, so that few programs do for every number of pictures.
        self._sizes = [*(2**n for n in range((max_batch - 1).bit_length())), max_batch]
        self._compiled: dict[int, Callable] = {}
        self._waiting: collections.deque[Request] = collections.deque()
        self._worker: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()  # guards the two
        self._process = os.getpid()

    @classmethod
    def connect(
        cls,
        slow: Callable[[jax.Array], jax.Array],
        fast: Callable[..., Any],
        *,
        size: tuple[int, ...],
        shape: tuple[int, ...],
        dtype=jnp.float32,
        max_batch: int = 64,
        max_delay: float = 0.002,
    ) -> "Session":
        """Makes a session for a slow and a fast network, joined as by `SlowFast`.

        The kernel does not depend on the data: it is made once, here.

        Args:
            slow: makes the kernel from the coordinates of its positions.
            fast: called with the kernel `(*size, features)` and data `(n, *shape)`.
            size: positions of the kernel per axis.
            shape: of one piece of data.
            dtype: of the data.
            max_batch: see `Session`.
            max_delay: see `Session`.

        Example:
            >>> slow = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            >>> fast = lambda kernel, x: jnp.sum(x * kernel[None], (1, 2))
            >>> with Session.connect(slow, fast, size=(8, 8), shape=(8, 8, 3)) as session:
            ...     ticket = session.send_data(np.ones((2, 8, 8, 3), np.float32))
            ...     session.receive_data(ticket).shape
            (2, 3)
        """
        layer = SlowFast(slow, fast, size)
        graph, state = nnx.split(layer)
        kernel = jax.jit(layer.kernel)()

        def function(variables: tuple, data: jax.Array) -> Any:
            state, kernel = variables
            return nnx.merge(graph, state).fast(kernel, data)

        served = Served(function, (state, kernel), tuple(shape), np.dtype(dtype))
        return cls(served, max_batch=max_batch, max_delay=max_delay)

    def start(self) -> "Session":
        """Compiles for batches of each size, and begins to answer; returns the session.

        Raises:
            ValueError: if the function gives no result for each row.
            RuntimeError: in a forked process.
        """
        self._check_process()
        function, state, shape, dtype = self.served
        for size in self._sizes[len(self._compiled) :]:
            data = jax.ShapeDtypeStruct((size, *shape), dtype)
            lowered = jax.jit(function).lower(state, data)
            found = jax.tree.map(lambda x: x.shape, lowered.out_info)
            if any(x.shape[:1] != (size,) for x in jax.tree.leaves(lowered.out_info)):
                raise ValueError(f"of {size} rows the function gives {found}, not {size} results")
            self._compiled[size] = lowered.compile()
        with self._changed:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="session")
        return self

    def stop(self) -> None:
        """Answers what has been sent, and ends; the session can be started again."""
        if os.getpid() != self._process:
            return  # the thread and the requests are those of the process that was forked
        with self._changed:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()

    def __enter__(self) -> "Session":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def send_data(self, data: np.ndarray | jax.Array) -> Ticket:
        """Asks for the results of data, and returns at once.

        Args:
            data: `(n, *shape)` of the session's dtype, such as n pictures, 1 or more.

        Returns:
            A ticket for `receive_data`: a `concurrent.futures.Future`.

        Raises:
            ValueError: for data of another shape.
            TypeError: for data of another dtype.
            RuntimeError: if the session is not running, or in a forked process.
        """
        self._check_process()
        request = Request(self._checked(data), Future())
        with self._changed:
            if self._worker is None:
                raise RuntimeError("the session is not running: call start()")
            self._waiting.append(request)
            self._worker.submit(self._serve)
            self._changed.notify()
        return request.ticket

    def receive_data(self, ticket: Ticket, timeout: float | None = None) -> Any:
        """Waits for the results of a request.

        Args:
            ticket: what `send_data` returned.
            timeout: seconds to wait; None for as long as it takes.

        Returns:
            The results, in NumPy arrays `(n, …)`; of a loaded model the logits `(n, classes)`.

        Raises:
            TimeoutError: if they are not there in time; the ticket stays good.
            TypeError: for what is no ticket.
            RuntimeError: in a forked process.
            Exception: what the computation of this request raised.
        """
        self._check_process()
        if not isinstance(ticket, Future):
            raise TypeError(f"a ticket is what send_data returns, got {type(ticket).__name__}")
        return ticket.result(timeout)

    def _check_process(self) -> None:
        """Raises RuntimeError in a forked process, which has no thread that would ever answer."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the session is of process {self._process}, and this is a fork of it: make a"
                " session in each process, after it has started"
            )

    def _checked(self, data: np.ndarray | jax.Array) -> np.ndarray:
        _, _, shape, dtype = self.served
        data = np.array(data)  # a copy, which the caller cannot change while it waits
        if data.dtype != dtype:
            raise TypeError(f"expected data of {dtype}, got {data.dtype}")
        if data.shape[1:] != shape or data.shape[:1] in ((), (0,)):
            raise ValueError(f"expected data (n, {', '.join(map(str, shape))}), got {data.shape}")
        return data

    def _serve(self) -> None:
        """Answers the requests that are there or come in a moment, if there are any."""
        if requests := self._collect():
            self._answer(requests)

    def _collect(self) -> list[Request]:
        """Takes waiting requests that fit into one batch, in their order."""
        requests, count, until = [], 0, time.monotonic() + self.max_delay
        with self._changed:
            while count < self.max_batch and (self._waiting or (requests and self._wait(until))):
                size = len(self._waiting[0].data)
                if requests and count + size > self.max_batch:
                    break
                request = self._waiting.popleft()
                if request.ticket.set_running_or_notify_cancel():
                    requests.append(request)
                    count += size
        return requests

    def _wait(self, until: float) -> bool:
        """Waits for a request until some time; says whether there is one."""
        return self._changed.wait_for(lambda: bool(self._waiting), until - time.monotonic())

    def _answer(self, requests: list[Request]) -> None:
        try:
            result = self._compute(np.concatenate([request.data for request in requests]))
        except Exception as error:
            if len(requests) == 1:
                requests[0].ticket.set_exception(error)
            else:  # one alone of them may be to blame
                for request in requests:
                    self._answer([request])
            return
        start = 0
        for request in requests:
            rows = slice(start, start + len(request.data))
            request.ticket.set_result(jax.tree.map(lambda x, rows=rows: x[rows].copy(), result))
            start = rows.stop

    def _compute(self, data: np.ndarray) -> Any:
        """Computes the results of any number of rows, as NumPy arrays."""
        parts = []
        for start in range(0, len(data), self.max_batch):
            part = data[start : start + self.max_batch]
            size = next(size for size in self._sizes if size >= len(part))
            rows = np.arange(size) % len(part)  # filled up from the beginning
            found = self._compiled[size](self.served.state, part[rows])
            parts.append(jax.tree.map(np.asarray, found))
        return jax.tree.map(lambda *found: np.concatenate(found)[: len(data)], *parts)


def _served(model: str | os.PathLike | LoadedModel, dtype: np.dtype) -> Served:
    """Returns what computes the logits of a loaded model, which is baked."""
    loaded = (model if isinstance(model, LoadedModel) else load_model(model)).baked()
    graph, state = nnx.split(loaded.model)

    def logits(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(loaded.inputs(images))

    loaded.check(np.zeros((1, *loaded.picture_shape), dtype))
    return Served(logits, state, loaded.picture_shape, dtype)
