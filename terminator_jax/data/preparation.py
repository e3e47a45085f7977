"""Preparing a TFDS data set: whole or not at all, by one process at a time.

    builder = prepared(lambda folder: Digits(data_dir=folder), Path("data"))

A data set appears under its name in one step, when all of it is written. A process that is killed
leaves a folder that the next one removes.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

UNFINISHED = "incomplete.terminator_jax."


def png(image: np.ndarray) -> io.BytesIO:
    """Returns a uint8 picture `(height, width, 1 or 3)` as a PNG file.

    Given an array, TFDS would ask TensorFlow to encode it.

    Example:
        >>> png(np.zeros((2, 2, 1), np.uint8)).read(4)
        b'\\x89PNG'
    """
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    file.seek(0)
    return file


def prepared(
    make: Callable[[Path], tfds.core.DatasetBuilder],
    data_dir: Path,
    downloads: Path | None = None,
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set in `data_dir`, prepared if it was not.

    Any number of processes may call this at once: one prepares the data set, the others wait.

    Args:
        make: makes the builder of the data set in a folder; it does not prepare it.
        data_dir: the folder that holds one folder for each data set.
        downloads: where archives are kept; None for a data set that needs none.

    Raises:
        OSError: if the folder cannot be written.
        Exception: whatever TFDS raises.
    """
    builder = make(data_dir)
    if builder.is_prepared():
        return builder
    folder = data_dir / builder.name
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as alone:
        if alone:
            _remove_leftovers(builder.name, folder, downloads)
        if not make(data_dir).is_prepared():
            try:
                _prepare(make, data_dir, folder, downloads)
            finally:
                if alone:
                    _remove_leftovers(builder.name, folder, downloads)
    return make(data_dir)


def _remove_leftovers(name: str, folder: Path, downloads: Path | None) -> None:
    """Removes what was not finished, of data sets and of archives."""
    unfinished = [*folder.glob(f"{UNFINISHED}*")]
    if downloads is not None:
        unfinished += (downloads / name).glob("*.tmp.*")  # of TFDS's downloader
    for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Waits until no other process prepares what belongs into the folder.

    Gives False where the file system has no locks. The lock ends with the process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    import fcntl  # which Windows does not have

    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _prepare(
    make: Callable[[Path], tfds.core.DatasetBuilder],
    data_dir: Path,
    folder: Path,
    downloads: Path | None,
) -> None:
    with tempfile.TemporaryDirectory(
        prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True
    ) as own:
        builder = make(Path(own))
        with _told(bars=downloads is not None):
            builder.download_and_prepare(
                download_dir=downloads or Path(own) / "downloads",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        made = Path(builder.data_dir)
        target = data_dir / made.relative_to(own)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(made, target)
        except OSError:
            if not make(data_dir).is_prepared():  # else another process was faster
                raise


@contextlib.contextmanager
def _told(bars: bool) -> Iterator[None]:
    """Hides TFDS's messages, which name the temporary folder; shows its bars only to a terminal."""
    if not (bars and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()
