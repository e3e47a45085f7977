"""Downloading a TFDS data set, and one line for whatever prevents that."""

import errno
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from terminator_jax.data import preparation
from terminator_jax.errors import InputError, SystemFailure, is_full, one_line

# Seconds until the server of a data set has to answer. TFDS itself gives up after 205 seconds.
PATIENCE = 4.0


def download(builder: tfds.core.DatasetBuilder) -> None:
    """Downloads and prepares a data set where its builder looks for it.

    Archives are kept in the folder `downloads` beside the data sets. Those that are there already
    are not downloaded again.

    Raises:
        InputError: if that cannot be done.
    """
    from terminator_jax.data.builders import BUILDERS  # imports every data set of TFDS

    root = builder.data_dir_root
    if "://" in str(root):
        raise InputError(
            f"{builder.name} can only be prepared in a local folder, not in {root}: set "
            "--config.data.data_dir to one"
        )
    maker = BUILDERS.get(builder.name, type(builder))
    config = {} if builder.builder_config is None else {"config": builder.builder_config.name}

    def make(data_dir: Path) -> tfds.core.DatasetBuilder:
        return maker(
            data_dir=data_dir, version=str(builder.version), file_format="array_record", **config
        )

    downloads = Path(root) / "downloads"
    try:
        _check_network(maker, downloads)
        print(f"{builder.name} is not in {root} yet: it is downloaded and prepared there")
        preparation.prepared(make, Path(root), downloads)
    except Exception as error:  # TFDS passes on whatever its downloads and data sets raise
        raise _explained(maker, root, error) from error


def _check_network(maker: type[tfds.core.DatasetBuilder], downloads: Path) -> None:
    """Raises OSError soon if an archive is missing whose server does not answer."""
    for url, info in (maker.url_infos or {}).items():
        name = resource.get_dl_fname(url, info.checksum)
        there = (downloads / maker.name / name, downloads / name)
        if url.startswith("http") and not any(map(resource.is_locally_cached, there)):
            return _check_server(url)


def _check_server(url: str) -> None:
    found: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:  # TFDS would ask ten times more
                found.append(f"{error.code} {error.reason}")
        except OSError as error:
            found.append(one_line(getattr(error, "reason", error)))
        found.append("")

    # In a thread, because looking up a name takes as long as it likes.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    problem = found[0] if found else "timed out"
    if problem:
        server = urllib.parse.urlsplit(url).netloc
        raise OSError(f"{server} does not answer ({problem}), is there a network?")


def _explained(maker: type[tfds.core.DatasetBuilder], root: Path, error: Exception) -> InputError:
    """Returns an error that says in one line why a data set cannot be had, and what to do."""
    text = one_line(error)
    if is_full(error):
        return SystemFailure(
            f"{maker.name} cannot be prepared: the disk of {root} is full: make room, or set "
            "TFDS_DATA_DIR or --config.data.data_dir to a folder on another one"
        )
    if isinstance(error, ImportError):
        package = (error.name or "tensorflow").partition(".")[0]
        return InputError(
            f"TFDS needs {package} to prepare {maker.name}, though not to read it: install it for "
            f"this once with `python -m pip install {package}` (what was downloaded is kept), or "
            "copy a prepared data set"
        )
    if isinstance(error, NonMatchingChecksumError):
        url = next((url for url in maker.url_infos or () if url in str(error)), "an archive")
        return InputError(
            f"{maker.name} cannot be downloaded: {url} has another checksum than TFDS knows, so "
            "it was changed or damaged on the way: try again, or copy a prepared data set"
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return InputError(
            f"{maker.name} cannot be prepared: {root} cannot be written ({text}): set "
            "TFDS_DATA_DIR or --config.data.data_dir to a folder that can"
        )
    return InputError(
        f"{maker.name} cannot be downloaded: {text or type(error).__name__}: try again, or copy a "
        f"prepared data set into {root}"
    )
