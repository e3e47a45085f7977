"""Serves a page on which a trained model can be tried, as `python -m terminator_jax.demo` does.

    GET  /         the page, page.html
    GET  /about    what the model is and what may be sent, in JSON
    POST /predict  a PNG or JPEG file; the classes and the pixel-level scores of each block, in JSON

What cannot be answered gets `{"error": "…"}` in words and a status of 400 or more.
"""

import http
import inspect
import json
import math
import socket
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.data.files import decode_picture
from terminator_jax.data.pictures import fitted
from terminator_jax.errors import InputError, one_line
from terminator_jax.loading import LoadedModel
from terminator_jax.prediction import probabilities
from terminator_jax.serve import Served, Session

PAGE = Path(__file__).with_name("page.html")
MAX_BYTES = 8 * 2**20
MAX_PIXELS = 16_000_000
TOP = 10
SECONDS = 60.0  # to wait for a sender, and for the model
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """Says with which status and in which words a request is refused."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Server(ThreadingHTTPServer):
    """Answers with a model; a context manager, which starts and stops its session.

    Args:
        loaded: the model.
        host: the address to listen at.
        port: the port; 0 for one that is free, which `url` names.

    Raises:
        OSError: if it cannot listen there.
    """

    daemon_threads = True

    def __init__(self, loaded: LoadedModel, host: str = "127.0.0.1", port: int = 0):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.loaded = loaded
        self.session = Session(scored(loaded), max_batch=1, max_delay=0)
        super().__init__((host, port), Handler)

    def __enter__(self) -> "Server":
        self.session.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server_close()
        self.session.stop()

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Is silent about browsers that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def about(self) -> dict[str, Any]:
        """Says what the model is, and what may be sent."""
        return {
            "model": self.loaded.config["model"],
            "shape": self.loaded.picture_shape,
            "classes": len(self.loaded.classes),
            "max_bytes": MAX_BYTES,
            "max_pixels": MAX_PIXELS,
        }

    def predict(self, data: bytes) -> dict[str, Any]:
        """Returns what the model says of the bytes of a file.

        Returns:
            `classes`, the likeliest with their probabilities; `picture`, what the model is given;
            `blocks`, for each its scores `(height, width)`, -100 to 100, and the `largest` of them.

        Raises:
            Refused: if it is no picture that can be read.
        """
        try:
            picture = decode_picture(data, "The file", max_pixels=MAX_PIXELS)
            picture = fitted(picture, self.loaded.picture_shape)
        except (InputError, ValueError) as error:
            raise Refused(400, str(error)) from error
        if picture.dtype == np.uint16:
            picture = (picture // 257).astype(np.uint8)
        try:
            found = self.session.receive_data(self.session.send_data(picture[None]), SECONDS)
        except TimeoutError as error:
            raise Refused(503, "The model is busy: try again.") from error
        except Exception as error:  # whatever the computation raised, such as a lack of memory
            raise Refused(500, f"The model failed: {one_line(error)}") from error
        found = jax.tree.map(lambda x: x[0], found)
        values = probabilities(found["logits"])
        order = (-values).argsort(kind="stable")[:TOP]
        names = self.loaded.classes
        return {
            "classes": [{"class": names[n], "probability": float(values[n])} for n in order],
            "picture": picture.tolist(),
            "blocks": [_percent(scores) for scores in found["scores"]],
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one request of a `Server`."""

    timeout = SECONDS  # of one who sends slowly
    server: Server

    def do_GET(self) -> None:
        """Sends the page or what it is about."""
        path = urllib.parse.urlsplit(self.path).path
        if path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/about":
            self._send_json(200, self.server.about())
        else:
            self._send_json(404, {"error": f"There is nothing at {self.path}."})

    def do_POST(self) -> None:
        """Sends what the model says of a picture."""
        try:
            if self.path != "/predict":
                raise Refused(404, f"There is nothing at {self.path}.")
            self._send_json(200, self.server.predict(self._body()))
        except Refused as refused:
            self._send_json(refused.status, {"error": str(refused)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(411, "The request does not say how long it is.")
        if int(length) > MAX_BYTES:
            self._discard(int(length))
            size = f"{int(length) / 2**20:.1f} MiB"
            raise Refused(413, f"The file has {size}, and {MAX_BYTES // 2**20} are allowed.")
        return self.rfile.read(int(length))

    def _discard(self, length: int) -> None:
        """Reads on for a while: a browser that is still sending sees no answer."""
        self.close_connection = True
        for _ in range(min(length, 16 * MAX_BYTES) // 2**16 + 1):
            if not self.rfile.read1(2**16):
                break

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers in JSON what `http.server` refuses by itself, such as another method."""
        self.close_connection = True
        self._send_json(int(code), {"error": message or http.HTTPStatus(code).phrase})

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


def scored(loaded: LoadedModel) -> Served:
    """Returns what computes a model's logits and the pixel-level scores of its blocks.

    The scores of a block are `x ⊙ K`, its input times its hyper-kernel, averaged over the channels:
    `(n, height, width)`. A model without hyper-kernels has none.
    """
    loaded = loaded.baked()
    graph, state = nnx.split(loaded.model)
    has_blocks = "intermediates" in inspect.signature(type(loaded.model).__call__).parameters

    def function(state: nnx.State, images: jax.Array) -> dict[str, Any]:
        model, x = nnx.merge(graph, state), loaded.inputs(images)
        if not has_blocks:
            return {"logits": model(x), "scores": []}
        logits, inter = model(x, intermediates=True)
        maps = zip([x, *inter.features], inter.hyper_kernels, strict=False)
        means = [jnp.mean(m * kernel[None].astype(m.dtype), -1) for m, kernel in maps]
        return {"logits": logits, "scores": [_on_picture(scores, loaded) for scores in means]}

    return Served(function, state, loaded.picture_shape, np.dtype(np.uint8))


def _on_picture(scores: jax.Array, loaded: LoadedModel) -> jax.Array:
    """Scores of the positions of a map or of a sequence, where they are in the picture."""
    height, width, _ = loaded.picture_shape
    if order := loaded.config["data"]["permutation"]:
        scores = scores[:, np.argsort(order)]
    return scores.reshape(-1, height, width).astype(jnp.float32)


def _percent(scores: np.ndarray) -> dict[str, Any]:
    largest = float(np.abs(scores).max())
    scaled = scores / largest if largest > 0 and math.isfinite(largest) else np.zeros_like(scores)
    return {"scores": np.rint(100 * scaled).astype(int).tolist(), "largest": largest}
