"""Own pictures: what is read, what becomes of the values, what is refused."""

import errno
import io
import os
import shutil
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from terminator_jax.data import files, own, sources
from terminator_jax.data.pictures import resized
from terminator_jax.errors import InputError

RNG = np.random.default_rng(0)


def noise(shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(path, image, mode=None):
    """Writes an array; pillow finds the mode by its shape and dtype."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = image[..., 0] if image.shape[-1] == 1 else image
    picture = PIL.Image.fromarray(flat)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def filtered(image):
    """The lines of a PNG of 16 bits, each under the next of the five filters."""
    height, width, channels = image.shape
    size = 2 * channels
    data = np.zeros((height + 1, size * (width + 1)), int)  # with a pixel of zeros before
    data[1:, size:] = image.astype(">u2").view(np.uint8).reshape(height, -1)
    lines = []
    for row in range(1, height + 1):
        x, a = data[row, size:], data[row, :-size]
        b, c = data[row - 1, size:], data[row - 1, :-size]
        distances = np.abs(np.stack([b - c, a - c, a + b - 2 * c]))
        paeth = np.choose(np.argmin(distances, 0), [a, b, c])
        kind = row % 5
        guess = [np.zeros_like(a), a, b, (a + b) // 2, paeth][kind]
        lines.append(bytes([kind]) + ((x - guess) % 256).astype(np.uint8).tobytes())
    return b"".join(lines)


def png16(image, interlaced=0):
    """A PNG of 16 bits a channel, which pillow writes for one channel only."""
    height, width, channels = image.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 16, kind, 0, 0, interlaced),
        b"IDAT": zlib.compress(filtered(image)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


@pytest.fixture
def animals(tmp_path):
    """Two splits of two classes; the pictures by their paths."""
    names = ["train/cat/b.png", "train/cat/a.png", "train/dog/1.PNG", "test/dog/2.png"]
    made = {name: noise((6, 5, 3)) for name in names}
    for name, image in made.items():
        save(tmp_path / name, image)
    (tmp_path / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path, made


def test_folders_are_splits_and_classes(animals):
    root, made = animals
    train, test = (sources.open_split(str(root), split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog")
    assert (train.shape, train.num_classes, train.name) == ((6, 5, 3), 2, f"{root} train")
    order = ["train/cat/a.png", "train/cat/b.png", "train/dog/1.PNG"]
    for read in (train.read(np.arange(3)), train.load().read(np.arange(3))):
        assert np.array_equal(read["image"], np.stack([made[name] for name in order]))
        assert read["label"].tolist() == [0, 0, 1] and read["label"].dtype == np.int32
    assert train.load().classes == ("cat", "dog")
    assert test.load().label.tolist() == [1]
    assert np.array_equal(train.read(np.array([2, 0]))["image"][0], made["train/dog/1.PNG"])


def test_a_folder_is_found_by_its_bare_name(animals, monkeypatch):
    root, _ = animals
    monkeypatch.chdir(root.parent)
    assert len(sources.open_split(root.name, "train")) == 3
    root.rename(root.parent / "mnist")
    assert not own.is_own("mnist") and own.is_own("./mnist")
    assert len(sources.open_split("./mnist", "train[:2]")) == 2


@pytest.fixture
def numbered(tmp_path):
    """Forty pictures of two classes without splits, each of its own shade."""
    for number in range(40):
        name = f"{'even' if number % 2 == 0 else 'odd'}/{number:02d}.png"
        save(tmp_path / name, np.full((2, 2, 1), number, np.uint8))
    return tmp_path


def shades(root, split, **settings):
    return sources.open_split(str(root), split, **settings).load().image[:, 0, 0, 0].tolist()


def test_a_part_is_held_out(numbered):
    train, test = (shades(numbered, split, eval_fraction=0.2) for split in ("train", "test"))
    assert len(test) == 8 and sorted(train + test) == list(range(40))
    assert train == sorted(train, key=lambda number: (number % 2, number))
    opened = sources.open_split(str(numbered), "test", eval_fraction=0.2)
    assert opened.classes == ("even", "odd")
    assert opened.label.tolist() == [number % 2 for number in test]
    assert shades(numbered, "test", eval_fraction=0.2) == test
    assert shades(numbered, "test", eval_fraction=0.2, split_seed=1) != test
    (numbered / "even" / "00.png").unlink()
    without = shades(numbered, "test", eval_fraction=0.2)
    assert len(set(test) & set(without)) >= 7  # the others stay where they were


def test_parts_of_splits(numbered):
    train, test = (shades(numbered, split) for split in ("train", "test"))
    assert shades(numbered, "train[:5]") == train[:5]
    assert shades(numbered, "train[-10%:]") == train[-4:]
    assert shades(numbered, "test+train[3:5]") == test + train[3:5]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_are_kept(tmp_path, channels):
    image = noise((5, 7, channels))
    assert np.array_equal(files.read_picture(save(tmp_path / "a.png", image)), image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_kept(tmp_path, channels):
    image = noise((11, 7, channels), np.uint16)
    (tmp_path / "class").mkdir()
    for name in "ab":
        (tmp_path / "class" / f"{name}.png").write_bytes(png16(image))
    opened = sources.open_split(str(tmp_path), "train", eval_fraction=0.5)
    assert opened.dtype == np.uint16
    for read in (opened.read(np.arange(1)), opened.load().read(np.arange(1))):
        assert read["image"].dtype == np.uint16
        assert np.array_equal(read["image"][0], image)


def test_other_kinds_of_png_and_jpeg(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(4, 1).repeat(8, 0)
    palette = save(tmp_path / "palette.png", colours, "P")
    assert np.array_equal(files.read_picture(palette), colours)
    with PIL.Image.open(palette) as picture:
        assert picture.mode == "P"
        picture.save(palette, transparency=picture.getpixel((0, 0)))
    alpha = np.where(colours[..., :1] == 255, 0, 255)
    assert np.array_equal(files.read_picture(palette), np.concatenate([colours, alpha], -1))
    bits = save(tmp_path / "bits.png", colours[..., :1], "1")
    assert np.array_equal(files.read_picture(bits), colours[..., :1])
    jpeg = tmp_path / "turned.jpg"
    exif = PIL.Image.Exif()
    exif[files.ORIENTATION] = 6  # the camera was turned
    PIL.Image.fromarray(colours).save(jpeg, exif=exif, quality=100, subsampling=0)
    read = files.read_picture(jpeg).astype(int)
    assert read.shape == (8, 8, 3)
    assert np.abs(read - np.rot90(colours, -1)).max() < 30
    [header] = {files.read_header(jpeg)}
    assert header == (8, 8, 3, np.uint8)


def cut(path, suffix):
    file = io.BytesIO()
    PIL.Image.fromarray(noise((40, 40, 3))).save(file, format=suffix)
    path.write_bytes(file.getvalue()[: file.tell() * 2 // 3])


BAD_FILES = {
    "lab.tif": (lambda p: PIL.Image.new("F", (4, 4)).save(p), "it has values of float32"),
    "deep.png": (lambda p: p.write_bytes(png16(noise((9, 9, 3), np.uint16))[:-40]), "truncated"),
    "cut.png": (lambda p: cut(p, "png"), "truncated"),
    "cut.jpg": (lambda p: cut(p, "jpeg"), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_refused(tmp_path, name):
    make, says = BAD_FILES[name]
    path = tmp_path / "train" / "class" / name
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(InputError) as error:
        sources.open_split(str(tmp_path), "train").load()
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    assert "\n" not in str(error.value)


def move(root, old, new):
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


BAD_FOLDERS = {
    "no split": (lambda r: shutil.rmtree(r / "test"), "has no split 'test': it has train, or"),
    "no pictures": (lambda r: [shutil.rmtree(r / s) for s in ("train", "test")], "no pictures: it"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "sizes": (lambda r: save(r / "test/cat/3.png", noise((6, 6, 3))), "set --config.data.resize"),
    "channels": (lambda r: save(r / "test/cat/3.png", noise((6, 5, 4))), "4 channels of 8 bits"),
    "depths": (lambda r: move(r, "train/cat/a.png", "a.png"), "has pictures at a.png, test"),
    "too deep": (lambda r: move(r, "test/dog/2.png", "test/dog/x/2.png"), "test/dog/x/2.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_folders_that_are_refused(animals, name):
    root, _ = animals
    change, says = BAD_FOLDERS[name]
    change(root)
    with pytest.raises(InputError) as error:
        sources.open_split(str(root), "test")
    assert says in str(error.value) and str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed(animals, monkeypatch):
    root, _ = animals
    before = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"dog cannot be read: Permission denied"):
        sources.open_split(str(root), "train")


def test_splits_without_classes_are_no_classes(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "1.png", noise((4, 4, 3)))
    with pytest.raises(InputError, match=r"pictures at test/1\.png, of no class"):
        sources.open_split(str(tmp_path), "train")


def test_bits_must_be_the_same(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", noise((4, 4, 1)))
    save(tmp_path / "train" / "a" / "2.png", noise((4, 4, 1), np.uint16))
    says = r"of 1 channel of 8 bits \(1\), of 1 channel of 16 bits \(1, such as train/a/2\.png\)"
    with pytest.raises(InputError, match=says):
        sources.open_split(str(tmp_path), "train")


def test_different_sizes_are_resized(tmp_path):
    for number, size in enumerate([(9, 12), (30, 7), (5, 5)]):
        save(tmp_path / "train" / "a" / f"{number}.png", np.full((*size, 3), 77, np.uint8))
    opened = sources.open_split(str(tmp_path), "train", resize=8)
    assert opened.shape == (8, 8, 3)
    assert np.array_equal(opened.load().image, np.full((3, 8, 8, 3), 77))


@pytest.mark.parametrize(("dtype", "error"), [(np.uint8, 1.01), (np.uint16, 0.51)])
def test_resizing_keeps_values(dtype, error):
    """A slope stays a slope, in each of five channels, up and down."""
    largest = np.iinfo(dtype).max
    for old, new in ((32, 8), (12, 36)):
        places = (np.arange(old) + 0.5) / old
        slopes = np.stack([largest * (places * (5 - c) / 5) for c in range(5)], -1)
        image = np.rint(np.broadcast_to(slopes, (old, old, 5))).astype(dtype)
        scaled = resized(image, new)
        assert scaled.dtype == dtype and scaled.shape == (new, new, 5)
        inner = slice(new // 4, -(new // 4))
        expected = largest * ((np.arange(new) + 0.5)[:, None] / new) * (5 - np.arange(5)) / 5
        assert np.abs(scaled[:, inner] - expected[inner]).max() < error + (old < new) * 0.5


def test_a_fourth_channel_is_no_transparency():
    image = noise((8, 8, 4))
    clear = image.copy()
    clear[..., 3] = 0
    assert np.array_equal(resized(image, 4)[..., :3], resized(clear, 4)[..., :3])
    assert resized(clear, 4)[..., :3].max() > 0


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
def test_npz(tmp_path, dtype):
    image, label = noise((20, 4, 3, 5), np.dtype(dtype).newbyteorder("=")), np.arange(20) % 3
    path = npz(tmp_path / "a.npz", image=image.astype(dtype), label=label, classes=["x", "y", "z"])
    train, test = (
        sources.open_split(path, split, eval_fraction=0.25) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (15, 5)
    assert train.classes == ("x", "y", "z") and train.shape == (4, 3, 5) and train.num_classes == 3
    assert train.dtype == np.dtype(dtype).newbyteorder("=")
    joined = {
        (picture.tobytes(), int(number))
        for part in (train.load(), test)
        for picture, number in zip(part.image, part.label, strict=True)
    }
    assert joined == {(x.tobytes(), int(y)) for x, y in zip(image, label, strict=True)}
    assert sources.open_split(path, "train[:4]", resize=2).shape == (2, 2, 5)


def test_npz_of_grey_pictures_and_names_as_labels(tmp_path):
    path = npz(tmp_path / "a.npz", image=noise((10, 4, 4)), label=["b", "a"] * 5)
    opened = sources.open_split(path, "train")
    assert opened.shape == (4, 4, 1) and opened.classes == ("a", "b")
    assert set(opened.label.tolist()) == {0, 1} and opened.label.dtype == np.int32


GOOD = {"image": np.zeros((4, 2, 2, 3), np.uint8), "label": np.arange(4)}
BAD_ARRAYS = {
    "float": ({"image": np.zeros((4, 2, 2, 3))}, "'image' must be uint8 or uint16, and is float64"),
    "32 bits": ({"image": np.zeros((4, 2, 2), np.uint32)}, "must be uint8 or uint16"),
    "flat": ({"image": np.zeros((4, 12), np.uint8)}, "must be (pictures, height, width, channels)"),
    "none": ({"image": np.zeros((0, 2, 2, 3), np.uint8), "label": np.arange(0)}, "(0, 2, 2, 3)"),
    "counts": ({"label": np.arange(5)}, "must have one label for a picture"),
    "columns": ({"label": np.ones((4, 3), int)}, "its rows are not one-hot"),
    "unknown": ({"label": list("abca"), "classes": list("ab")}, "has the labels c, not in its"),
    "twice": ({"classes": list("abca")}, "has two classes of one name"),
    "negative": ({"label": np.arange(4) - 1}, "has labels from -1 to 2"),
    "classes": ({"classes": np.array(["a", "b"])}, "from 0 to 3, and they must be from 0 to 1"),
    "kind": ({"label": np.arange(4) / 2}, "must be whole numbers from 0 on, names or"),
    "objects": ({"label": np.array([0, 1, 2, None])}, "cannot be read as an .npz of arrays"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_refused(tmp_path, name):
    arrays, says = BAD_ARRAYS[name]
    path = npz(tmp_path / "a.npz", **GOOD | arrays)
    with pytest.raises(InputError) as error:
        sources.open_split(path, "train", eval_fraction=0.5)
    assert says in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match="there is no file"):
        sources.open_split(str(path), "train")
    np.savez(path, images=GOOD["image"])
    with pytest.raises(
        InputError, match=r"must have the arrays 'image' and 'label', .* and has images"
    ):
        sources.open_split(str(path), "train")
    np.savez(path, **GOOD | {"image": noise((4, 20, 20, 3))})
    for data in (path.read_bytes()[:3000], b"hello", b""):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.npz cannot be read as an \.npz of arrays"):
            sources.open_split(str(path), "train")
    with path.open("wb") as file:
        np.save(file, GOOD["image"])
    with pytest.raises(InputError, match=r"a\.npz cannot be read as an \.npz of arrays"):
        sources.open_split(str(path), "train")


def test_damage_inside_an_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **GOOD | {"image": noise((4, 20, 20, 3))})
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npz cannot be read as an \.npz of arrays"):
        sources.open_split(str(path), "train", eval_fraction=0.5)
