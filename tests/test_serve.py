"""Sessions: every answer right and to the right caller, together in batches, failing alone."""

import concurrent.futures
import threading
import time

import jax
import numpy as np
import pytest
import runs
from flax import nnx

import terminator_jax
from terminator_jax.layers import SlowFast
from terminator_jax.serve import Served, Session

IMAGES, _ = runs.pictures()
ROWS = dict(shape=(2,), dtype=np.dtype(np.float32))


class Watched:
    """Doubles rows; remembers the sizes of batches, waits if told to, and refuses negative rows."""

    def __init__(self, wait=0.0):
        self.wait, self.sizes = wait, []

    def __call__(self, state, data):
        return jax.pure_callback(self.double, jax.ShapeDtypeStruct(data.shape, data.dtype), data)

    def double(self, data):
        self.sizes.append(len(data))
        time.sleep(self.wait)
        data = np.asarray(data)
        if (data < 0).any():
            raise ValueError("negative rows")
        return 2 * data


def rows(value, count=1):
    return np.full((count, 2), value, np.float32)


def ask(session, data):
    return session.receive_data(session.send_data(data), timeout=60)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.write_linear(tmp_path_factory.mktemp("runs") / "linear")


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


def test_many_threads_and_malformed_requests(workdir, threads):
    """2,000 requests of 1 to 8 pictures; 1 of 50 is malformed."""
    expected = terminator_jax.load_model(workdir).logits(IMAGES)
    malformed = [
        (IMAGES[:2].astype(np.float32), TypeError, "expected data of uint8, got float32"),
        (IMAGES[:2, :7], ValueError, "expected data (n, 8, 8, 1), got (2, 7, 8, 1)"),
        (IMAGES[0], ValueError, "got (8, 8, 1)"),
        (IMAGES[:0], ValueError, "got (0, 8, 8, 1)"),
        ("picture", TypeError, "got <U7"),
    ]

    def client(number):
        rng = np.random.default_rng(number)
        for _ in range(63):
            if rng.random() < 0.02:
                data, error, says = malformed[rng.integers(len(malformed))]
                with pytest.raises(error) as raised:
                    ask(session, data)
                assert says in str(raised.value)
            else:
                chosen = rng.integers(len(IMAGES), size=rng.integers(1, 9))
                found = ask(session, IMAGES[chosen])
                np.testing.assert_allclose(found, expected[chosen], atol=1e-4)
        return number

    with Session(workdir) as session:
        assert list(threads.map(client, range(32))) == list(range(32))


def test_requests_of_one_moment_are_computed_together(threads):
    watched = Watched(wait=0.05)
    served = Served(watched, None, **ROWS)
    with Session(served, max_batch=24, max_delay=0) as session:
        found = list(threads.map(lambda n: ask(session, rows(n)), range(32)))
    assert [result.tolist() for result in found] == [rows(2 * n).tolist() for n in range(32)]
    assert set(watched.sizes) <= {1, 2, 4, 8, 16, 24} and len(watched.sizes) < 8


def test_a_batch_waits_for_its_delay_or_until_it_is_full(threads):
    watched = Watched()
    with Session(Served(watched, None, **ROWS), max_batch=4, max_delay=30) as session:
        start = time.monotonic()
        list(threads.map(lambda n: ask(session, rows(n)), range(4)))
        assert watched.sizes == [4] and time.monotonic() - start < 10
    with Session(Served(watched, None, **ROWS), max_batch=4, max_delay=2) as session:
        tickets = [session.send_data(rows(1))]
        time.sleep(0.05)
        tickets.append(session.send_data(rows(2)))
        assert [session.receive_data(ticket).max() for ticket in tickets] == [2, 4]
    assert watched.sizes == [4, 2]


def test_a_request_of_many_rows_is_computed_in_parts():
    watched = Watched()
    with Session(Served(watched, None, **ROWS), max_batch=4) as session:
        data = np.arange(22, dtype=np.float32).reshape(11, 2)
        assert ask(session, data).tolist() == (2 * data).tolist()
    assert watched.sizes == [4, 4, 4]


def test_a_computation_that_fails_fails_alone():
    watched = Watched()
    with Session(Served(watched, None, **ROWS), max_delay=0.5) as session:
        tickets = [session.send_data(rows(value)) for value in (1, -1, 3)]
        assert [session.receive_data(tickets[n]).max() for n in (0, 2)] == [2, 6]
        with pytest.raises(jax.errors.JaxRuntimeError, match="negative rows"):
            session.receive_data(tickets[1])
    assert watched.sizes == [4, 1, 1, 1]


def test_stop_answers_what_was_sent():
    session = Session(Served(Watched(wait=0.02), None, **ROWS), max_batch=1).start()
    tickets = [session.send_data(rows(n)) for n in range(10)]
    session.stop()
    assert [ticket.result(0).max() for ticket in tickets] == [2 * n for n in range(10)]
    with pytest.raises(RuntimeError, match=r"not running: call start\(\)"):
        session.send_data(rows(1))
    session.stop()
    with session:
        assert ask(session, rows(4)).max() == 8


def test_sending_while_others_stop(threads):
    """Each request is either refused or answered."""
    session = Session(Served(Watched(wait=0.001), None, **ROWS), max_batch=4).start()
    refused = threading.Event()

    def client(number):
        count = 0
        while not refused.is_set():
            try:
                assert ask(session, rows(number)).max() == 2 * number
                count += 1
            except RuntimeError as error:
                assert "not running" in str(error)
                refused.set()
        return count

    counts = [threads.submit(client, n) for n in range(8)]
    time.sleep(0.1)
    session.stop()
    assert sum(count.result(60) for count in counts) > 0


def test_a_timeout_leaves_the_ticket_good():
    with Session(Served(Watched(wait=0.3), None, **ROWS)) as session:
        ticket = session.send_data(rows(1))
        with pytest.raises(TimeoutError):
            session.receive_data(ticket, timeout=0.01)
        assert session.receive_data(ticket, timeout=60).max() == 2
        assert session.receive_data(ticket, timeout=0).max() == 2


def test_a_cancelled_request_is_not_computed():
    watched = Watched(wait=0.2)
    with Session(Served(watched, None, **ROWS), max_batch=1) as session:
        first, second = session.send_data(rows(1)), session.send_data(rows(2))
        assert second.cancel() and session.receive_data(first).max() == 2
    assert watched.sizes == [1]


def test_what_the_caller_changes_afterwards_does_not_matter():
    data = rows(1)
    with Session(Served(Watched(), None, **ROWS), max_delay=0.1) as session:
        ticket = session.send_data(data)
        data[:] = 7
        assert session.receive_data(ticket).max() == 2


def test_results_may_be_a_tree():
    served = Served(lambda two, x: {"x": x, "sums": [two * x.sum(-1)]}, 2.0, **ROWS)
    with Session(served) as session:
        found = ask(session, rows(3, count=2))
    assert found["x"].tolist() == [[3, 3], [3, 3]] and found["sums"][0].tolist() == [12, 12]


def test_connect_makes_the_kernel_once():
    calls = []

    class Slow(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, coordinates):
            calls.append(coordinates.shape)
            return self.linear(coordinates)

    class Fast(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(np.float32(3))

        def __call__(self, kernel, x):
            return self.scale[...] * x * kernel[None]

    slow, fast = Slow(nnx.Rngs(0)), Fast()
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 3)).astype(np.float32)
    with Session.connect(slow, fast, size=(6, 6), shape=(6, 6, 3), max_batch=4) as session:
        found = ask(session, x)
        assert calls == [(36, 2)]
    expected = SlowFast(slow, fast, size=(6, 6))(x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pictures_of_16_bits(workdir):
    with Session(workdir, dtype=np.uint16, max_batch=2) as session:
        found = ask(session, IMAGES[:2].astype(np.uint16) * 257)
    expected = terminator_jax.load_model(workdir).logits(IMAGES[:2])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_wrong_use(tmp_path, workdir):
    text = runs.write(tmp_path / "text", runs.tests_config("tiny_text"), classes=())
    for make, error, says in (
        (lambda: Session(tmp_path), ValueError, "there is no trained model at"),
        (lambda: Session(text), ValueError, "has no logits of images"),
        (lambda: Session(workdir, dtype=np.float32), TypeError, "images of uint8 or uint16"),
        (lambda: Session(workdir, max_batch=0), ValueError, "max_batch is 0, and must be a whole"),
        (lambda: Session(workdir, max_batch=2.5), ValueError, "max_batch is 2.5, and must be a"),
        (lambda: Session(workdir, max_delay=-1), ValueError, "max_delay is -1, and must be sec"),
        (lambda: Session(workdir, max_delay=np.inf), ValueError, "max_delay is inf, and must be"),
        (lambda: Session(workdir, max_delay=np.nan), ValueError, "max_delay is nan, and must be"),
        (lambda: Session(workdir).send_data(IMAGES), RuntimeError, "call start()"),
        (lambda: Session(workdir).receive_data(1), TypeError, "what send_data returns, got int"),
        (
            lambda: Session(Served(lambda _, x: x.sum(0), None, **ROWS), max_batch=1).start(),
            ValueError,
            "of 1 rows the function gives (2,), not 1 results",
        ),
    ):
        with pytest.raises(error) as raised:
            make()
        assert says in str(raised.value)


def test_a_forked_process_is_told(run_python):
    """Its copy of the session has no thread that would answer; leaving it ends nothing."""
    out = run_python(
        """
        import os, sys, warnings
        import numpy as np
        from terminator_jax.serve import Served, Session
        warnings.simplefilter("ignore")  # JAX warns of the fork
        data = np.ones((1, 3), np.float32)
        served = Served(lambda two, x: two * x, 2.0, shape=(3,), dtype=np.dtype(np.float32))
        with Session(served, max_batch=1) as session:
            ticket = session.send_data(data)
            if os.fork() == 0:
                for call in (lambda: session.send_data(data), session.start,
                             lambda: session.receive_data(ticket, timeout=5)):
                    try:
                        call()
                    except RuntimeError as error:
                        print(error, flush=True)
                session.stop()
                os._exit(0)
            os.wait()
            print(session.receive_data(session.send_data(data)).tolist())
        """,
        timeout=100,
    )
    *told, answer = out.splitlines()
    assert len(told) == 3 and answer == "[[2.0, 2.0, 2.0]]"
    assert all("make a session in each process" in line for line in told)


def test_what_a_session_is_for():
    """Data of 64 bits only where JAX has them; shapes as people write them."""
    with pytest.raises(ValueError, match="data of int64 need JAX_ENABLE_X64=1"):
        Session(Served(Watched(), None, shape=(2,), dtype=np.int64))
    with Session(Served(Watched(), None, shape=[2], dtype="float32")) as session:
        assert ask(session, rows(1)).tolist() == rows(2).tolist()
        with pytest.raises(ValueError, match=r"expected data \(n, 2\), got \(\)"):
            session.send_data(np.float32(1))
