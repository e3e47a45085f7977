"""Data sets that are downloaded and prepared without TensorFlow, from a server on this machine."""

import dataclasses
import errno
import gzip
import os
import shutil
import subprocess
import tarfile
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from data import serve_archives

from terminator_jax.data import builders, download, preparation, sources, text
from terminator_jax.errors import InputError

PICTURES = [name for name in serve_archives.MAKERS if name != "tiny_shakespeare"]

CHILD = """
import os, pathlib, sys, time
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from terminator_jax.data import builders, preparation, sources

for name, infos in {infos!r}.items():
    builders.BUILDERS[name].url_infos = infos
folder = pathlib.Path({folder!r})

def start(patch=lambda: None):
    child = os.fork()
    if child == 0:
        patch()
        sources.open_builder("cifar10", data_dir=str(folder), download=True)
        os._exit(0)
    return child
"""


@pytest.fixture(scope="module")
def server():
    with serve_archives.Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def child(server, run_python):
    """Runs code in a process whose data sets come from the server."""

    def run(folder, code, names=("cifar10",), **settings):
        infos = {name: server.add(name, serve_archives.MAKERS[name]()[0]) for name in names}
        before = CHILD.format(infos=infos, folder=str(folder))
        return run_python(before + textwrap.dedent(code), **settings)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module", autouse=True)
def prepare_all(server, run_python, folder):
    """Every data set, prepared and read by plain TFDS without TensorFlow."""
    infos = {name: server.add(name, make()[0]) for name, make in serve_archives.MAKERS.items()}
    code = CHILD.format(infos=infos, folder=str(folder)) + textwrap.dedent("""
        for name in builders.BUILDERS:
            sources.open_builder(name, data_dir=str(folder), download=True)
            plain = tfds.builder(name, data_dir=folder)
            for split in plain.info.splits:
                examples = tfds.data_source(name, split=split, data_dir=folder)
                assert len(examples) == plain.info.splits[split].num_examples > 0
                assert set(examples[0]) == set(plain.info.features)
        assert "tensorflow" not in sys.modules
    """)
    run_python(code)


def rows(image, label):
    """Pictures with their labels, in an order of their own."""
    return sorted((x.tobytes(), int(y)) for x, y in zip(image, label, strict=True))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_the_archives(folder, name):
    for split, (image, label) in serve_archives.MAKERS[name]()[1].items():
        if split == "unlabelled":
            continue
        opened = sources.open_split(name, split, data_dir=str(folder))
        read = opened.load()
        assert rows(read.image, read.label) == rows(image, label)
        assert len(opened.classes) == opened.num_classes and read.classes == opened.classes
        assert not np.array_equal(read.label, label)  # shuffled, as TFDS does


def test_names_of_classes_come_from_the_archives(folder):
    opened = sources.open_split("cifar100", "test", data_dir=str(folder))
    assert opened.classes == tuple(f"class {i}" for i in range(100))
    [example] = tfds.data_source("cifar100", split="test[:1]", data_dir=folder)
    assert example["coarse_label"] == example["label"] // 5


def test_pictures_without_label(folder):
    examples = tfds.data_source("stl10", split="unlabelled", data_dir=folder)
    image = serve_archives.MAKERS["stl10"]()[1]["unlabelled"][0]
    assert sorted(e["image"].tobytes() for e in examples) == sorted(x.tobytes() for x in image)
    assert {int(e["label"]) for e in examples} == {-1}


def test_text(folder):
    for split, part in serve_archives.MAKERS["tiny_shakespeare"]()[1].items():
        read = text.open_text("tiny_shakespeare", split, (4, 4), data_dir=str(folder))
        assert read.data.tobytes() == part


def test_archives_and_checksums_are_those_of_tfds():
    for name, builder in builders.BUILDERS.items():
        original = tfds.builder_cls(name)
        assert issubclass(builder, original) and builder.name == original.name
        assert builder.url_infos == original.url_infos != {}
        assert len(next(iter(builder.url_infos.values())).checksum) == 64


@dataclasses.dataclass
class Extracted:
    """A download manager for TFDS's own builders: their archives, extracted already."""

    archives: dict[str, bytes]
    folder: Path

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: self.download(url) for key, url in urls.items()}
        path = self.folder / Path(urls).name
        path.write_bytes(self.archives[path.name])
        return str(path)

    def download_and_extract(self, urls):
        if isinstance(urls, dict):
            return {key: self.download_and_extract(url) for key, url in urls.items()}
        path, target = Path(self.download(urls)), self.folder / f"{Path(urls).name}.extracted"
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                archive.extractall(target, filter="data")
        else:
            target.write_bytes(gzip.decompress(path.read_bytes()))
        return str(target)


def examples_of(builder, manager, count):
    """What a builder generates: by split, pairs of key and example."""
    splits = builder._split_generators(manager)
    if not isinstance(splits, dict):
        splits = {
            split.name: builder._generate_examples(
                **split.gen_kwargs
                | (
                    {"num_examples": count[split.name]}
                    if "num_examples" in split.gen_kwargs
                    else {}
                )
            )
            for split in splits
        }
    return {name: list(examples) for name, examples in splits.items()}


def plain(value):
    """A feature's value as an array: TFDS's builders give pictures as arrays, ours as files."""
    return np.asarray(PIL.Image.open(value) if hasattr(value, "read") else value).squeeze()


@pytest.mark.parametrize("name", serve_archives.MAKERS)
def test_examples_and_keys_are_those_of_tfds(monkeypatch, tmp_path, name):
    """TFDS's own code on the same archives, with `open` for what it takes of TensorFlow."""
    archives = serve_archives.MAKERS[name]()[0]
    original = tfds.builder_cls(name)
    gfile = types.SimpleNamespace(GFile=open, isdir=os.path.isdir)
    tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(f"{original.__module__}.tf", tensorflow)
    manager = Extracted(archives, tmp_path)
    count = {"train": serve_archives.TRAIN, "test": serve_archives.TEST}
    made = [
        cls(data_dir=tmp_path / cls.__module__, file_format="array_record")
        for cls in (original, builders.BUILDERS[name])
    ]
    theirs = examples_of(made[0], manager, count)
    monkeypatch.setattr(builders.BUILDERS[name], "url_infos", original.url_infos)
    ours = examples_of(made[1], manager, count)
    assert made[0].info.features.to_json() == made[1].info.features.to_json()
    assert list(map(str, ours)) == list(map(str, theirs))
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert [key for key, _ in mine] == [key for key, _ in other]
        for (_, a), (_, b) in zip(mine, other, strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(plain(a[key]), plain(b[key])) for key in a)


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_killed_three_times_it_ends_the_same(child, server, folder, tmp_path):
    server.delay = 0.2
    child(
        tmp_path,
        """
        import itertools, signal
        def slow_picture():
            before, count = builders.png, itertools.count()
            def png(image):
                time.sleep(10 * (next(count) > 50))
                return before(image)
            builders.png = png
        def slow_move():
            before, place = os.rename, folder / "cifar10"
            os.rename = lambda a, b: (
                time.sleep(60) if pathlib.Path(b).parent == place else before(a, b)
            )
        stages = [
            (lambda: None, lambda: [*folder.glob("downloads/cifar10/*.tmp.*/*")]),
            (slow_picture, lambda: [*folder.glob("cifar10/incomplete.*/cifar10/incomplete.*")]),
            (slow_move, lambda: [*folder.glob("cifar10/incomplete.*/cifar10/3.0.2/*info.json")]),
        ]
        for patch, ready in stages:
            process, end = start(patch), time.time() + 60
            while not ready() and time.time() < end:
                time.sleep(0.01)
            os.kill(process, signal.SIGKILL)
            assert os.waitpid(process, 0)[1] == signal.SIGKILL
            assert ready(), "killed in time"
            assert len([*folder.glob("cifar10/incomplete.*")]) == 1, "of those before, none is left"
            assert not (folder / "cifar10" / "3.0.2").exists()
        assert os.waitpid(start(), 0)[1] == 0
        """,
    )
    server.delay = 0.0
    archive = "cifar-10-binary.tar.gz"
    assert sorted(path.name for path in (tmp_path / "cifar10").iterdir()) == ["3.0.2"]
    assert not [name for name in everything(tmp_path) if "incomplete" in name or ".tmp." in name]
    for split in ("train", "test"):
        first, other = (
            sources.open_split("cifar10", split, data_dir=str(place)).load()
            for place in (folder, tmp_path)
        )
        assert np.array_equal(first.image, other.image)
        assert np.array_equal(first.label, other.label)
    assert server.asked.count(f"/cifar10/{archive}") < 8


def test_several_at_once_download_once(child, server, tmp_path):
    server.asked.clear()
    child(
        tmp_path,
        """
        processes = [start() for _ in range(3)]
        assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
        """,
    )
    assert sorted(path.name for path in (tmp_path / "cifar10").iterdir()) == ["3.0.2"]
    # Each looks whether the server answers, and one downloads.
    assert 2 <= len(server.asked) <= 4
    assert len(sources.open_split("cifar10", "train", data_dir=str(tmp_path)).load()) == 128


@pytest.fixture
def served(server, monkeypatch):
    """CIFAR-10's builder in this process, with archives from the server."""
    infos = server.add("cifar10", serve_archives.cifar10()[0])
    monkeypatch.setattr(builders.BUILDERS["cifar10"], "url_infos", infos)
    return infos


def refusal(folder, name="cifar10"):
    with pytest.raises(InputError) as error:
        sources.open_split(name, "train", data_dir=str(folder), download=True)
    assert "\n" not in str(error.value)
    assert not [name for name in everything(folder) if "incomplete" in name or ".tmp." in name]
    assert not (folder / "cifar10" / "3.0.2").exists()
    return str(error.value)


def test_wrong_checksum(served, monkeypatch, tmp_path):
    [(url, info)] = served.items()
    wrong = {url: dataclasses.replace(info, checksum="0" * 64)}
    monkeypatch.setattr(builders.BUILDERS["cifar10"], "url_infos", wrong)
    assert f"{url} has another checksum than TFDS knows" in refusal(tmp_path)


def test_the_archive_is_gone(server, served, tmp_path):
    server.archives.pop("/cifar10/cifar-10-binary.tar.gz")
    assert "HTTP code: 404" in refusal(tmp_path)


def test_archives_that_are_there_need_no_network(served, monkeypatch, tmp_path):
    def fail(image):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(builders, "png", fail)
        assert f"the disk of {tmp_path} is full: make room" in refusal(tmp_path)
    monkeypatch.setattr(download, "_check_server", pytest.fail)
    monkeypatch.setattr("requests.Session.get", pytest.fail)
    assert len(sources.open_split("cifar10", "train", data_dir=str(tmp_path), download=True)) == 128


@pytest.mark.parametrize("size", ["32k", "200k"])
def test_disk_full(served, tmp_path, size):
    """While downloading (33 kB) and while writing what is prepared."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        assert f"the disk of {tmp_path} is full: make room" in refusal(tmp_path)
    finally:
        # Lazily, since a thread may still hold a file that it could not write.
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    start = time.perf_counter()
    says = refusal(tmp_path)
    assert time.perf_counter() - start < 6
    assert says.startswith("cifar10 cannot be downloaded: www.cs.toronto.edu does not answer (")


def test_a_server_that_never_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PATIENCE", 0.5)
    ended = threading.Event()

    def wait(url, timeout):
        ended.wait()
        raise OSError("the test is over")  # what ends its thread, and not another test's

    monkeypatch.setattr("urllib.request.urlopen", wait)
    try:
        assert "www.cs.toronto.edu does not answer (timed out)" in refusal(tmp_path)
    finally:
        ended.set()


def test_a_folder_that_cannot_be_made(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cifar10 cannot be .*file"):
        sources.open_split("cifar10", "train", data_dir=str(tmp_path / "file"), download=True)


@pytest.mark.parametrize("kept", [0, 1000, 70000])
def test_a_damaged_data_set(folder, tmp_path, kept):
    shutil.copytree(folder / "cifar10", tmp_path / "cifar10")
    [file] = (tmp_path / "cifar10" / "3.0.2").glob("*-train.array_record-*")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        InputError, match=r"3\.0\.2 cannot be read: .*: remove this folder"
    ) as error:
        sources.open_split("cifar10", "train", data_dir=str(tmp_path)).load()
    assert "\n" not in str(error.value)


def test_leftovers_of_the_digits_are_removed(tmp_path):
    from terminator_jax.data import digits

    left = tmp_path / "digits" / f"{preparation.UNFINISHED}killed"
    left.mkdir(parents=True)
    assert digits.open_builder(tmp_path).is_prepared()
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
