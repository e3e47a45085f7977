"""Builders of TFDS's data sets that read the original archives without TensorFlow.

Each is TFDS's own builder, and so has its name, version, features, archives and checksums. Only how
the archives are opened is written here. What they prepare is what TFDS prepares.

The archives of a builder are its `url_infos`: a table of addresses with the size, the checksum and
the name of the file behind each.
"""

import contextlib
import functools
import gzip
import itertools
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import tensorflow_datasets as tfds

from terminator_jax.data.preparation import png

TFDSExamples = Iterator[tuple[Any, dict[str, Any]]]


def _download(builder: tfds.core.DatasetBuilder, dl_manager: Any) -> dict[str, Path]:
    """Downloads every archive of a builder; gives the place of each by its file's name."""
    urls = {info.filename: url for url, info in builder.url_infos.items()}
    return dl_manager.download(urls)


@contextlib.contextmanager
def _opened(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """Opens a file of a tar archive."""
    with tarfile.open(archive) as tar, tar.extractfile(name) as file:
        yield file


def _read(archive: Path, name: str) -> bytes:
    with _opened(archive, name) as file:
        return file.read()


def _lines(archive: Path, name: str) -> list[str]:
    return [line for line in _read(archive, name).decode().split("\n") if line]


class _Idx:
    """Pictures and labels in files of the MNIST format."""

    def _split_generators(self, dl_manager: Any) -> dict[str, TFDSExamples]:
        files = _download(self, dl_manager)
        return {
            split: self._generate_examples(
                files[f"{prefix}-images-idx3-ubyte.gz"], files[f"{prefix}-labels-idx1-ubyte.gz"]
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }

    def _generate_examples(self, images: Path, labels: Path) -> TFDSExamples:
        with gzip.open(images) as file:
            _, *shape = struct.unpack(">4I", file.read(16))
            pixels = np.frombuffer(file.read(), np.uint8).reshape(*shape, 1)
        with gzip.open(labels) as file:
            classes = file.read()[8:]
        for index, (image, label) in enumerate(zip(pixels, classes, strict=True)):
            yield index, {"image": png(image), "label": label}


class Mnist(_Idx, tfds.builder_cls("mnist"), skip_registration=True):
    """MNIST."""

    name = "mnist"


class FashionMnist(_Idx, tfds.builder_cls("fashion_mnist"), skip_registration=True):
    """Fashion-MNIST."""

    name = "fashion_mnist"


class Kmnist(_Idx, tfds.builder_cls("kmnist"), skip_registration=True):
    """Kuzushiji-MNIST."""

    name = "kmnist"


class _Cifar:
    """Records of a few labels and 32×32×3 bytes, channel by channel."""

    folder: str
    files: dict[str, tuple[str, ...]]
    # In the order of the labels in a record.
    labels: dict[str, str]

    def _split_generators(self, dl_manager: Any) -> dict[str, TFDSExamples]:
        [archive] = _download(self, dl_manager).values()
        for feature, file in self.labels.items():
            self.info.features[feature].names = _lines(archive, f"{self.folder}/{file}")
        return {split: self._generate_examples(archive, split) for split in self.files}

    def _generate_examples(self, archive: Path, split: str) -> TFDSExamples:
        index, size = itertools.count(), len(self.labels) + 32 * 32 * 3
        for file in self.files[split]:
            data = np.frombuffer(_read(archive, f"{self.folder}/{file}"), np.uint8)
            for record in data.reshape(-1, size):
                key, classes = next(index), record[: len(self.labels)]
                image = record[len(self.labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    key,
                    {
                        "id": f"{split}_{key:05d}",
                        "image": png(np.ascontiguousarray(image)),
                        **dict(zip(self.labels, map(int, classes), strict=True)),
                    },
                )


class Cifar10(_Cifar, tfds.builder_cls("cifar10"), skip_registration=True):
    """CIFAR-10."""

    name = "cifar10"
    folder = "cifar-10-batches-bin"
    files = {  # noqa: RUF012
        "train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        "test": ("test_batch.bin",),
    }
    labels = {"label": "batches.meta.txt"}  # noqa: RUF012


class Cifar100(_Cifar, tfds.builder_cls("cifar100"), skip_registration=True):
    """CIFAR-100."""

    name = "cifar100"
    folder = "cifar-100-binary"
    files = {"train": ("train.bin",), "test": ("test.bin",)}  # noqa: RUF012
    labels = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}  # noqa: RUF012


class Stl10(tfds.builder_cls("stl10"), skip_registration=True):
    """STL-10; its pictures are read one by one, since those without label take 2.7 GB."""

    name = "stl10"

    def _split_generators(self, dl_manager: Any) -> dict[str, TFDSExamples]:
        [archive] = _download(self, dl_manager).values()
        self.info.features["label"].names = _lines(archive, "stl10_binary/class_names.txt")
        return {
            "train": self._generate_examples(archive, "train_X.bin", "train_y.bin"),
            "test": self._generate_examples(archive, "test_X.bin", "test_y.bin"),
            "unlabelled": self._generate_examples(archive, "unlabeled_X.bin"),
        }

    def _generate_examples(self, archive: Path, images: str, labels: str = "") -> TFDSExamples:
        # Labels are from 1 on in the archive, and -1 where there are none.
        classes = _read(archive, f"stl10_binary/{labels}") if labels else itertools.repeat(0)
        with _opened(archive, f"stl10_binary/{images}") as file:
            pictures = iter(functools.partial(file.read, 96 * 96 * 3), b"")
            for index, (data, label) in enumerate(zip(pictures, classes, strict=bool(labels))):
                image = np.frombuffer(data, np.uint8).reshape(3, 96, 96).transpose(2, 1, 0)
                example = {"image": png(np.ascontiguousarray(image))}
                yield index, {**example, "label": label - 1 if labels else -1}


class TinyShakespeare(tfds.builder_cls("tiny_shakespeare"), skip_registration=True):
    """Tiny Shakespeare."""

    name = "tiny_shakespeare"

    def _split_generators(self, dl_manager: Any) -> dict[str, TFDSExamples]:
        [file] = _download(self, dl_manager).values()
        text = Path(file).read_bytes().decode()
        train = int(len(text) * 0.9)
        validation = train + int((len(text) - train) * 0.5)
        parts = {
            "train": text[:train],
            "validation": text[train:validation],
            "test": text[validation:],
        }
        return {split: self._generate_examples(split, part) for split, part in parts.items()}

    def _generate_examples(self, split: str, text: str) -> TFDSExamples:
        yield split, {"text": text}


BUILDERS = {
    builder.name: builder
    for builder in (Mnist, FashionMnist, Kmnist, Cifar10, Cifar100, Stl10, TinyShakespeare)
}
for name, builder in BUILDERS.items():
    # TFDS looks for them beside the module of the class.
    builder.url_infos = tfds.builder_cls(name).url_infos
