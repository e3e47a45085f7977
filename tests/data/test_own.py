"""Own pictures of every kind: what is read, held out, converted, left out and said."""

import unicodedata

import numpy as np
import PIL.Image
import pytest

from terminator_jax.data import files, sources
from terminator_jax.data.pictures import converted
from terminator_jax.errors import InputError

RNG = np.random.default_rng(0)


def noise(shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(path, image, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def classes_of(root, split="train", **settings):
    opened = sources.open_split(str(root), split, **settings)
    return [opened.classes[n] for n in opened.label]


WRITTEN = {
    "a.jfif": dict(format="JPEG"), "a.jpe": dict(format="JPEG"), "a.jpg": dict(format="WEBP"),
    "a": dict(format="PNG"), "a.bmp": {}, "a.gif": {}, "a.ppm": {}, "a.tif": {}, "a.webp": {},
    "a.jp2": {}, "a.png": dict(format="GIF"), "a.txt": dict(format="PNG"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_the_content_decides_what_a_picture_is(tmp_path, name):
    image = np.kron(noise((2, 2, 3)), np.ones((8, 8, 1), np.uint8))
    save(tmp_path / "train" / "cat" / name, image, **WRITTEN[name])
    [read] = sources.open_split(str(tmp_path), "train").load().image
    assert read.shape == (16, 16, 3)
    assert np.abs(read.astype(int) - image)[2:-2:11, 2:-2:11].max() < 60


@pytest.mark.parametrize("suffix", ["tif", "ppm", "png"])
def test_16_bits_of_three_channels(tmp_path, suffix):
    import cv2

    image = noise((5, 7, 3), np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), image[..., ::-1])
    assert np.array_equal(files.read_picture(tmp_path / f"a.{suffix}"), image)
    assert files.read_header(tmp_path / f"a.{suffix}") == (5, 7, 3, np.uint16)


def test_of_several_pictures_the_first_is_read(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.gif", "a.webp"):
        options = dict(lossless=True) if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert files.read_picture(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


def test_what_is_left_out_is_counted_and_emptied_classes_are_named(tmp_path, capsys):
    for name in ("ape", "bee"):
        save(tmp_path / name / "1.png", noise((4, 4, 3)))
        save(tmp_path / name / "2.png", noise((4, 4, 3)))
    for name in ("ape/notes.txt", "cat/1.heic", "cat/2.heic", "dog/broken.png", "ape/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "eel").mkdir()
    (tmp_path / "ape" / ".DS_Store").write_bytes(b"")
    assert sources.open_split(str(tmp_path), "train").classes == ("ape", "bee")
    left_out, emptied = capsys.readouterr().err.splitlines()
    assert "2 .heic, 1 .db, 1 .txt, 1 .png cannot be read as pictures and are left out" in left_out
    assert emptied.endswith("has no pictures of cat, dog, eel")


def test_classes_of_one_split_are_named(tmp_path, capsys):
    for name in ("train/Cat", "train/dog", "test/cat", "test/dog"):
        save(tmp_path / name / "1.png", noise((4, 4, 3)))
    sources.open_split(str(tmp_path), "train")
    [line] = capsys.readouterr().err.splitlines()
    says = "classes that only some splits have: test has none of Cat; train has none of cat"
    assert line.endswith(says)


def test_one_name_in_two_encodings_is_one_class(tmp_path, capsys):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        save(tmp_path / split / unicodedata.normalize(form, "café") / "1.png", noise((4, 4, 3)))
        save(tmp_path / split / "bar" / "1.png", noise((4, 4, 3)))
    for split in ("train", "test"):
        assert classes_of(tmp_path, split) == ["bar", unicodedata.normalize("NFC", "café")]
    assert not capsys.readouterr().err


@pytest.fixture
def mixed(tmp_path):
    """Colour pictures with one of each other kind among them."""
    red = np.zeros((4, 4, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    for n in range(6):
        save(tmp_path / "train" / "a" / f"{n}.png", red)
    save(tmp_path / "train" / "b" / "cmyk.jpg", red, "CMYK", quality=100)
    save(tmp_path / "train" / "b" / "grey.png", red, "L")
    save(tmp_path / "train" / "b" / "palette.png", red, "P")
    save(tmp_path / "train" / "b" / "rgba.png", red, "RGBA")
    return tmp_path


def test_channels_are_converted(mixed):
    for channels in (3, -1):
        colours = sources.open_split(str(mixed), "train", channels=channels).load().image
        assert colours.shape == (10, 4, 4, 3)
        exact = [colours[n, 0, 0].tolist() for n in (0, 7, 8, 9)]
        assert exact == [[255, 0, 0], [76, 76, 76], [255, 0, 0], [255, 0, 0]]
        assert np.abs(colours[6].astype(int) - [255, 0, 0]).max() < 10
    grey = sources.open_split(str(mixed), "train", channels=1).load().image
    assert grey.shape == (10, 4, 4, 1) and np.abs(grey.astype(int) - 76).max() <= 2
    alpha = sources.open_split(str(mixed), "train", channels=4).load().image
    assert alpha.shape == (10, 4, 4, 4) and (alpha[..., 3] == 255).all()


def test_all_that_differ_are_counted_at_once(mixed):
    with pytest.raises(InputError) as error:
        sources.open_split(str(mixed), "train")
    assert str(error.value).endswith(
        "has pictures of 3 channels of 8 bits (8), of 1 channel of 8 bits (1, such as "
        "train/b/grey.png), of 4 channels of 8 bits (1, such as train/b/rgba.png): "
        "set --config.data.channels=3, which converts them"
    )


def test_conversion_of_transparency_and_depth():
    half = np.array([[[0, 128]]], np.uint8)
    assert converted(half, 1).tolist() == [[[127]]]
    assert converted(half, 4).tolist() == [[[0, 0, 0, 128]]]
    deep = np.array([[[0, 0, 65535]]], np.uint16)
    assert converted(deep, 1).tolist() == [[[7471]]]
    assert converted(deep, 4).tolist() == [[[0, 0, 65535, 65535]]]
    with pytest.raises(ValueError, match="5 channels cannot become 3"):
        converted(np.zeros((1, 1, 5), np.uint8), 3)


def test_channels_of_arrays_and_of_data_sets(tmp_path):
    np.savez(tmp_path / "a.npz", image=noise((8, 4, 4)), label=np.arange(8) % 2)
    opened = sources.open_split(str(tmp_path / "a.npz"), "train", channels=3)
    assert opened.shape == (4, 4, 3) and np.ptp(opened.image, axis=-1).max() == 0
    grey, colour = (sources.open_split("digits", "test", channels=n) for n in (0, 3))
    assert colour.shape == colour.load().image.shape[1:] == (8, 8, 3)
    assert np.array_equal(grey.load().image, colour.load().image[..., :1])


def test_every_class_is_held_out_in_its_part(tmp_path):
    """Of a rare class too, and all in all the same part."""
    label = np.array(["often"] * 1000 + ["seldom"] * 5 + ["once"])
    path = tmp_path / "a.npz"
    np.savez(path, image=noise((1006, 1, 1)), label=label)
    for seed in range(8):
        kept, held = (classes_of(path, part, split_seed=seed) for part in ("train", "test"))
        assert (len(kept), len(held)) == (905, 101)
        assert held.count("seldom") == 1 and "once" not in held
    drawn = [classes_of(path, "test", split_seed=seed, stratify=False) for seed in range(8)]
    assert {len(held) for held in drawn} == {101}
    assert 0 in [held.count("seldom") for held in drawn]


IMAGES, NUMBERS = noise((12, 4, 4, 3)), np.arange(12) % 3
NAMES = np.array(["ant", "bee", "cat"])
ARCHIVES = {
    "keras": dict(x_train=IMAGES, y_train=NUMBERS, x_test=IMAGES, y_test=NUMBERS),
    "medmnist": {
        f"{split}_{what}": value
        for split in ("train", "val", "test")
        for what, value in (("images", IMAGES), ("labels", NUMBERS[:, None]))
    },
    "scikit-learn": dict(
        data=IMAGES.reshape(12, -1), images=IMAGES, target=NUMBERS, target_names=NAMES
    ),
    "one-hot": dict(image=IMAGES, label=np.eye(3)[NUMBERS]),
    "booleans": dict(image=IMAGES, label=NUMBERS > 0),
    "floats": dict(images=IMAGES.astype(np.int64), labels=NUMBERS.astype(np.float32)),
    "texts": dict(image=IMAGES, label=NAMES[NUMBERS]),
    "texts and classes": dict(image=IMAGES, label=NAMES[NUMBERS], classes=NAMES[::-1]),
    "bytes": dict(image=IMAGES, label=NAMES.astype("S")[NUMBERS]),
    "from one": dict(image=IMAGES, label=NUMBERS + 1),
}
CLASSES = {
    "scikit-learn": NAMES, "booleans": "01", "texts": NAMES, "texts and classes": NAMES[::-1],
    "bytes": NAMES, "from one": "123",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_arrays_as_others_write_them(tmp_path, name, capsys):
    np.savez(tmp_path / "a.npz", **ARCHIVES[name])
    opened = sources.open_split(str(tmp_path / "a.npz"), "train", eval_fraction=0.25)
    assert opened.classes == tuple(map(str, CLASSES.get(name, "012")))
    whole = name in ("keras", "medmnist")
    assert len(opened) == (12 if whole else 9)
    pairs = zip(opened.image, opened.label, strict=True)
    found = {image.tobytes(): opened.classes[n] for image, n in pairs}
    for image, number in zip(IMAGES, NUMBERS, strict=True):
        wanted = {"booleans": str(min(number, 1)), "from one": str(number + 1)}.get(
            name, NAMES[number] if CLASSES.get(name) is not None else str(number)
        )
        assert found.get(image.tobytes(), wanted) == wanted
    assert not capsys.readouterr().err


def test_gaps_in_labels_are_named_and_no_classes(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", image=IMAGES, label=np.array([0, 1, 4])[NUMBERS])
    assert sources.open_split(str(tmp_path / "a.npz"), "train").classes == ("0", "1", "4")
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("no picture has the label 2, 3: it is no class")
