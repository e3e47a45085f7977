"""Archives of arrays that nobody need trust."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from terminator_jax import npz


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def array(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def test_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(3), y=np.ones((2, 2), np.uint8))
    found = npz.read(tmp_path / "a.npz")
    assert found.keys() == {"x", "y"} and found["x"].tolist() == [0, 1, 2]


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_runs(tmp_path):
    planted = np.array([Planted(tmp_path / "planted")], object)
    for content in (array(planted), pickle.dumps(Planted(tmp_path / "planted"))):
        with pytest.raises(ValueError, match=r"a.npz cannot be read as an .npz of arrays: "):
            npz.read(archive(tmp_path / "a.npz", x=content))
    assert not (tmp_path / "planted").exists()


def test_a_few_bytes_do_not_take_all_memory(tmp_path):
    """Neither zeros that compress well nor a shape that only announces itself."""
    bomb = archive(tmp_path / "a.npz", x=bytes(2**29))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(ValueError, match="its arrays take 536,870,912 bytes, more than 2"):
        npz.read(bomb)
    header = array(np.zeros(2)).replace(b"(2,)", b"(2" + b"0" * 14 + b",)")
    with pytest.raises(ValueError, match=r"cannot be read as an .npz of arrays"):
        npz.read(archive(tmp_path / "a.npz", x=header))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\0" * 100, b"\x93NUMPY\1\0v\0{'descr"])
def test_what_is_none(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an .npz of arrays"):
        npz.read(tmp_path / "a.npz")
