"""The page: what the server answers, and what a real browser shows."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib

import jax
import numpy as np
import PIL.Image
import pytest
import runs

import terminator_jax
from terminator_jax import page
from terminator_jax.prediction import probabilities

pytestmark = pytest.mark.usefixtures("unoptimized")

IMAGES, LABELS = runs.pictures()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def serve():
    """Starts servers of loaded models, and ends them."""
    with contextlib.ExitStack() as stack:

        def serve(workdir):
            server = stack.enter_context(page.Server(terminator_jax.load_model(workdir)))
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield serve


@pytest.fixture(scope="module")
def linear(serve, tmp_path_factory):
    return serve(runs.write_linear(tmp_path_factory.mktemp("runs") / "linear"))


def ask(server, method, path, body=None, headers={}):  # noqa: B006
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def post(server, body, **headers):
    status, content = ask(server, "POST", "/predict", body, headers)
    return status, json.loads(content)


def test_a_picture_is_classified(linear):
    for n in range(5):
        status, found = post(linear, file_of(IMAGES[n]))
        [expected] = probabilities(linear.loaded.logits(IMAGES[n : n + 1]))
        order = np.argsort(-expected)
        assert status == 200 and found["blocks"] == []
        assert [row["class"] for row in found["classes"]] == [str(k) for k in order]
        shares = [row["probability"] for row in found["classes"]]
        assert shares == pytest.approx(expected[order], 1e-3)
        assert np.array_equal(found["picture"], IMAGES[n])


def test_pictures_of_another_size_and_kind_are_converted(linear):
    grey = np.kron(IMAGES[6, ..., 0], np.ones((40, 40), np.uint8))
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    file = io.BytesIO()
    deep.save(file, "PNG")
    for data in (file_of(np.stack([grey] * 3, -1), "JPEG"), file.getvalue()):
        status, found = post(linear, data)
        assert status == 200 and found["classes"][0]["class"] == str(LABELS[6])


def png_header(width, height):
    """A file that claims to be a large picture."""
    body = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"", 400, "The file cannot be read: it is no whole picture"),
        (b"GIF89a", 400, "it is no whole picture"),
        (file_of(IMAGES[0])[:60], 400, "The file cannot be read: "),
        (png_header(5000, 4000), 400, "it has 4000×5000 pixels, and 16,000,000 are allowed"),
        (png_header(60_000, 60_000), 400, "The file cannot be read: "),
        (bytes(page.MAX_BYTES + 1), 413, "The file has 8.0 MiB, and 8 are allowed."),
    ],
    ids=["empty", "gif", "truncated", "many pixels", "far too many pixels", "large"],
)
def test_what_is_refused_is_refused_in_words(data, status, says, linear):
    got, found = post(linear, data)
    assert got == status and says in found["error"]
    assert post(linear, file_of(IMAGES[0]))[0] == 200  # and the server goes on


def test_other_requests(linear):
    assert ask(linear, "GET", "/other")[0] == 404
    assert ask(linear, "POST", "/other", b"")[0] == 404
    assert ask(linear, "GET", "/?a=1")[0] == 200
    status, body = ask(linear, "OPTIONS", "/")[:2]
    assert status == 501 and "OPTIONS" in json.loads(body)["error"]
    assert post(linear, iter([b"abc"]), **{"Transfer-Encoding": "chunked"})[0] == 411
    assert post(linear, b"", **{"Content-Length": "-1"})[0] == 411
    status, content = ask(linear, "GET", "/")
    assert status == 200 and content == page.PAGE.read_bytes()
    about = json.loads(ask(linear, "GET", "/about")[1])
    assert (about["shape"], about["classes"]) == ([8, 8, 1], 10)


def test_it_listens_at_the_loopback_address(linear):
    assert linear.server_address[0] == "127.0.0.1"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", linear.url)


@pytest.fixture(scope="module")
def terminators(serve, tmp_path_factory):
    """Of pictures, and of sequences of pixels in an order of their own."""
    order = tuple(np.random.default_rng(0).permutation(64).tolist())
    found = []
    for fields in (
        [],
        ["data.sequence=True", f"data.permutation={order}", "model.variant=sdigits"],
    ):
        config = runs.tests_config("tiny", *fields)
        if fields:
            config.model.options.operator = "product"
        found.append(serve(runs.write(tmp_path_factory.mktemp("runs") / "tiny", config)))
    return found


@pytest.mark.parametrize("index", [0, 1], ids=["pictures", "sequences"])
def test_scores_of_the_blocks(terminators, index):
    """Of the first block: the normalized picture times the kernel at each pixel."""
    server = terminators[index]
    loaded = server.loaded
    _, found = post(server, file_of(IMAGES[3]))
    [block] = found["blocks"]
    x = loaded.inputs(IMAGES[3:4])
    _, inter = jax.jit(lambda x: loaded.model(x, intermediates=True))(x)
    scores = np.asarray((x * inter.hyper_kernels[0][None]).mean(-1))[0].ravel()
    if order := loaded.config["data"]["permutation"]:
        unordered = np.empty_like(scores)
        unordered[list(order)] = scores
        scores = unordered
    expected = 100 * scores.reshape(8, 8) / np.abs(scores).max()
    np.testing.assert_allclose(block["scores"], expected, atol=0.6)
    assert block["largest"] == pytest.approx(np.abs(scores).max(), 1e-3)


def test_the_command(tmp_path):
    """Until Ctrl-C; the address is printed."""
    config = runs.tests_config("tiny")
    workdir = runs.write(tmp_path / "tiny", config)
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-m", "terminator_jax.demo", workdir, "--port=0"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "compiling\n"
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/predict", file_of(IMAGES[0]))
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")


def test_wrong_use(run_main, tmp_path):
    workdir = runs.write_linear(tmp_path / "linear")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, says in (
            ([tmp_path], "there is no trained model at"),
            ([workdir, "--port=70000"], "--port is 70000, and must be from 0 to 65535"),
            ([workdir, f"--port={port}"], f"--port={port}: Address already in use"),
            ([workdir, "--host=no.such.host.invalid"], "cannot listen at --host=no.such.host"),
        ):
            code, out, err = run_main("demo", *arguments)
            assert (code, out, err.count("\n")) == (2, "", 1) and says in err


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens the page of a server; fails for what the page's script throws."""
    pages, thrown = [], []

    def opened(server):
        tab = browser.new_page()
        tab.on("pageerror", lambda error: thrown.append(error))
        tab.goto(server.url)
        tab.wait_for_selector("#about:not(:empty)")
        pages.append(tab)
        return tab

    yield opened
    for tab in pages:
        tab.close()
    assert thrown == []


DROP = """([name, bytes]) => {
    const transfer = new DataTransfer();
    if (bytes) transfer.items.add(new File([new Uint8Array(bytes)], name));
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


def first(tab):
    tab.wait_for_selector("#classes li")
    return tab.inner_text("#classes li:first-child span")


def test_browser_a_digit_is_dropped(opened, linear):
    tab = opened(linear)
    tab.evaluate(DROP, ["digit.png", list(file_of(IMAGES[6]))])
    assert first(tab) == str(LABELS[6]) and tab.inner_text("#message") == ""
    assert tab.is_hidden("#blocks")
    assert tab.evaluate("drawing.getContext('2d').getImageData(0, 0, 300, 300).data.some(v => v)")


def test_browser_a_file_is_chosen(opened, terminators):
    tab = opened(terminators[0])
    file = dict(name="digit.png", mimeType="image/png", buffer=file_of(IMAGES[6]))
    tab.set_input_files("#file", file)
    first(tab)
    assert tab.is_visible("#blocks") and tab.locator("#blocks figure canvas").count() == 2
    titles = tab.locator("figcaption").all_inner_texts()
    assert titles[0] == "the input" and re.fullmatch(r"block 1, ±[\d.e-]+", titles[1])


def test_browser_a_digit_is_drawn(opened, linear):
    tab = opened(linear)
    box = tab.locator("#drawing").bounding_box()
    tab.mouse.move(box["x"] + 150, box["y"] + 30)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 150, box["y"] + 270, steps=8)
    tab.mouse.up()
    assert first(tab) == "1"
    tab.click("#clear")
    assert tab.locator("#classes li").count() == 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (file_of(IMAGES[0])[:60], "The file cannot be read: "),
        (page.MAX_BYTES + 2**20, "The file has 9.0 MiB, and 8 are allowed."),
        (None, "That was no file."),
    ],
    ids=["broken", "large", "none"],
)
def test_browser_a_broken_file_is_answered_in_words(data, says, opened, linear):
    tab = opened(linear)
    tab.evaluate(DROP, ["digit.png", list(data) if isinstance(data, bytes) else data])
    tab.wait_for_selector("#message:not(:empty)")
    assert tab.inner_text("#message").startswith(says)
    assert tab.locator("#classes li").count() == 0
