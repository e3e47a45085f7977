"""Small archives in the data sets' original formats, served on this machine.

    python tests/data/serve_archives.py terminator_jax.train --config=experiments/mnist.py …

does what `python -m terminator_jax.train --config=experiments/mnist.py …` does, and data sets that
are not there are downloaded from here: 128 random pictures for training and 64 for evaluation.
"""

import gzip
import hashlib
import http.server
import io
import itertools
import runpy
import struct
import sys
import tarfile
import threading
import time

import numpy as np
from tensorflow_datasets.core.download.checksums import UrlInfo

from terminator_jax.data.builders import BUILDERS

TRAIN, TEST = 128, 64


def mnist(train=TRAIN, test=TEST, classes=10, seed=0):
    """The four archives of MNIST, and what is in them: pictures and labels of each split."""
    rng, archives, truth = np.random.default_rng(seed), {}, {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        image, label = pictures(rng, count, (28, 28, 1), classes)
        idx = {
            f"{prefix}-images-idx3-ubyte.gz": struct.pack(">4I", 0x803, count, 28, 28),
            f"{prefix}-labels-idx1-ubyte.gz": struct.pack(">2I", 0x801, count),
        }
        for (name, header), data in zip(idx.items(), (image, label), strict=True):
            archives[name] = gzip.compress(header + data.tobytes(), mtime=0)
        truth[split] = image, label
    return archives, truth


def cifar10(train=TRAIN, test=TEST, seed=0):
    rng, names = np.random.default_rng(seed), [f"class {i}" for i in range(10)]
    truth = {
        split: pictures(rng, count, (32, 32, 3), 10)
        for split, count in (("train", train), ("test", test))
    }
    parts = np.array_split(np.arange(train), 5)
    batches = {f"data_batch_{n + 1}.bin": ("train", rows) for n, rows in enumerate(parts)}
    batches["test_batch.bin"] = ("test", np.arange(test))
    files = {"batches.meta.txt": "\n".join([*names, ""]).encode()}
    for name, (split, rows) in batches.items():
        image, label = (x[rows] for x in truth[split])
        files[name] = records(image.transpose(0, 3, 1, 2), label)
    return {"cifar-10-binary.tar.gz": tar("cifar-10-batches-bin", files)}, truth


def cifar100(train=TRAIN, test=TEST, seed=0):
    rng, truth = np.random.default_rng(seed), {}
    files = {
        "coarse_label_names.txt": "".join(f"group {i}\n" for i in range(20)).encode(),
        "fine_label_names.txt": "".join(f"class {i}\n" for i in range(100)).encode(),
    }
    for split, count in (("train", train), ("test", test)):
        image, label = truth[split] = pictures(rng, count, (32, 32, 3), 100)
        files[f"{split}.bin"] = records(image.transpose(0, 3, 1, 2), label // 5, label)
    return {"cifar-100-binary.tar.gz": tar("cifar-100-binary", files)}, truth


def stl10(train=TRAIN, test=TEST, seed=0):
    rng, truth = np.random.default_rng(seed), {}
    files = {"class_names.txt": "".join(f"class {i}\n" for i in range(10)).encode()}
    for split, name, count in (
        ("train", "train", train), ("test", "test", test), ("unlabelled", "unlabeled", 10),
    ):  # fmt: skip
        image, label = truth[split] = pictures(rng, count, (96, 96, 3), 10)
        files[f"{name}_X.bin"] = image.transpose(0, 3, 2, 1).tobytes()
        if split != "unlabelled":
            files[f"{name}_y.bin"] = (label + 1).tobytes()
    return {"stl10_binary.tar.gz": tar("stl10_binary", files)}, truth


def tiny_shakespeare(length=20000, seed=0):
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz \n", np.uint8)
    text = np.random.default_rng(seed).choice(letters, length).tobytes()
    train, validation = int(length * 0.9), int(length * 0.95)
    truth = {
        "train": text[:train], "validation": text[train:validation], "test": text[validation:],
    }  # fmt: skip
    return {"input.txt": text}, truth


MAKERS = {
    "mnist": mnist, "fashion_mnist": mnist, "kmnist": mnist, "cifar10": cifar10,
    "cifar100": cifar100, "stl10": stl10, "tiny_shakespeare": tiny_shakespeare,
}  # fmt: skip


def pictures(rng, count, shape, classes):
    """Patches of 4×4 pixels of one colour, which compress as real pictures do; every label."""
    height, width, channels = shape
    coarse = rng.integers(0, 256, (count, height // 4, width // 4, channels), np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2), (np.arange(count) % classes).astype(np.uint8)


def records(image, *labels):
    """Labels and picture of each, one after the other."""
    rows = [*(label[:, None] for label in labels), image.reshape(len(image), -1)]
    return np.concatenate(rows, axis=1).astype(np.uint8).tobytes()


def tar(folder, files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves archives at `/DATA SET/FILE`, and counts how often each was asked for.

    Attributes:
        archives: bytes by path.
        asked: paths in the order in which they were asked for.
        delay: seconds to wait before each 16 KiB.
    """

    daemon_threads = True

    def __init__(self, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archives, self.asked, self.delay = {}, [], delay
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, dataset, archives):
        """Serves the archives of a data set; gives them as a builder's `url_infos`."""
        infos = {}
        for name, data in archives.items():
            self.archives[f"/{dataset}/{name}"] = data
            url = f"http://127.0.0.1:{self.server_port}/{dataset}/{name}"
            infos[url] = UrlInfo(len(data), hashlib.sha256(data).hexdigest(), name)
        return infos


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = self.server.archives.get(self.path)
        if data is None:
            return self.send_error(404)
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for start in itertools.count(0, 1 << 14):
            if start >= len(data):
                return None
            time.sleep(self.server.delay)
            try:
                self.wfile.write(data[start : start + (1 << 14)])
            except OSError:  # whoever asked has gone
                return None

    def log_message(self, *_):
        pass


def redirect(server, datasets=tuple(MAKERS)):
    """Lets the builders of these data sets in this process download from the server."""
    for name in datasets:
        BUILDERS[name].url_infos = server.add(name, MAKERS[name]()[0])


if __name__ == "__main__":
    redirect(Server())
    module, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__", alter_sys=True)
