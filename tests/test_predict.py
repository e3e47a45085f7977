"""Predictions from the command line: what is read, what is printed, what is refused."""

import codecs
import csv
import io
import json
import os
import sys
import types

import numpy as np
import PIL.Image
import pytest
import runs

import terminator_jax
from terminator_jax.data.pictures import fitted, resized
from terminator_jax.prediction import probabilities

IMAGES, LABELS = runs.pictures()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.write_linear(tmp_path_factory.mktemp("runs") / "linear")


@pytest.fixture
def predict(run_main, workdir):
    """Exit code, rows by their names, and the lines on standard error."""

    def predict(*arguments, model=workdir):
        code, out, err = run_main("predict", model, *arguments, "--format=jsonl")
        rows = [json.loads(line) for line in out.split("\n") if line]
        return code, {row["picture"]: row["classes"] for row in rows}, err.splitlines()

    return predict


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))

    return give


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    return path


def png(image):
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()


def expected(images, workdir):
    return probabilities(terminator_jax.load_model(workdir).logits(images))


def test_a_folder_of_good_broken_and_other_files(predict, workdir, tmp_path):
    files = [save(tmp_path / f"{n % 3}" / f"{n:03d}.png", IMAGES[n]) for n in range(100)]
    for n in range(5):
        (tmp_path / f"broken{n}.png").write_bytes(png(IMAGES[n])[: 10 + 12 * n])
    for name in ("notes.txt", "labels.csv", "Makefile"):
        (tmp_path / name).write_text("no picture")
    code, rows, err = predict(tmp_path)
    assert code == 1 and rows.keys() == {str(file) for file in files}
    found = [rows[str(file)] for file in files]
    hits = [row[0]["class"] == str(label) for row, label in zip(found, LABELS, strict=False)]
    assert sum(hits) > 90
    for row, values in zip(found, expected(IMAGES[:100], workdir), strict=True):
        assert [kind["class"] for kind in row] == [str(n) for n in np.argsort(-values)[:3]]
        assert [kind["probability"] for kind in row] == pytest.approx(-np.sort(-values)[:3], 1e-3)
    broken, [others, last] = err[:5], err[5:]
    assert all(f"broken{n}.png cannot be read: " in broken[n] for n in range(5))
    assert others.startswith("left out, no pictures: ") and others.endswith("notes.txt")
    assert last == "5 could not be predicted, as said above"


@pytest.mark.parametrize("how", ["file", "folder", "pattern", "npy", "stdin", "stdin npy", "names"])
def test_ways_to_name_the_same_picture(how, predict, stdin, tmp_path):
    array = io.BytesIO()
    np.save(array, IMAGES[3])
    if "npy" in how:
        (tmp_path / "picture.npy").write_bytes(array.getvalue())
        file = tmp_path / "picture.npy"
    else:
        file = save(tmp_path / "below" / "picture.png", IMAGES[3])
    stdin({"stdin": png(IMAGES[3]), "stdin npy": array.getvalue()}.get(how, f"\n{file}\n".encode()))
    path = {"file": file, "npy": file, "folder": tmp_path, "pattern": f"{tmp_path}/**/*.png"}
    code, rows, err = predict(path.get(how, "-"))
    [(name, classes)] = rows.items()
    assert (code, name, err) == (0, "-" if "stdin" in how else str(file), [])
    assert classes[0]["class"] == str(LABELS[3])


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (IMAGES[:90], 90),  # more than a batch of the model
        (IMAGES[:4, ..., 0], 4),
        (IMAGES[0], 1),
        (IMAGES[0, ..., 0], 1),
        (IMAGES[:2].astype(">u2") * 257, 2),
    ],
)
def test_arrays(array, count, predict, tmp_path):
    np.save(tmp_path / "a.npy", array)
    code, rows, _ = predict(tmp_path / "a.npy")
    single = count == 1
    names = [str(tmp_path / "a.npy") + ("" if single else f"[{n}]") for n in range(count)]
    assert code == 0 and list(rows) == names
    first, _ = rows[names[0]][0].values()
    assert first == str(LABELS[0])


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((8, 8)), "must hold uint8 or uint16, and holds float64"),
        (np.zeros((8, 8), np.int8), "must hold uint8 or uint16, and holds int8"),
        (np.zeros((2, 2, 8, 8, 1), np.uint8), "and holds (2, 2, 8, 8, 1)"),
        (np.zeros((0, 8, 8, 1), np.uint8), "and holds (0, 8, 8, 1)"),
        (np.array([None]), "cannot be read as an array: "),
    ],
)
def test_arrays_that_hold_no_pictures(array, says, predict, tmp_path):
    np.save(tmp_path / "a.npy", array)
    code, rows, err = predict(tmp_path / "a.npy")
    assert (code, rows) == (1, {}) and says in err[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1',\n",  # cut off inside of its header
        b"\x93NUMPY\x01\x00\x50\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999999999,)}".ljust(80),
    ],
)
def test_a_damaged_array_loses_no_other_picture(data, predict, stdin, tmp_path):
    (tmp_path / "a.npy").write_bytes(data)
    good = save(tmp_path / "b.png", IMAGES[0])
    stdin(data)
    code, rows, err = predict(tmp_path, "-")
    assert code == 1 and list(rows) == [str(good)]
    assert all("cannot be read as an array: " in line for line in err[:2]) and len(err) == 3


def test_an_array_of_colours_is_one_picture(predict, tmp_path):
    np.save(tmp_path / "a.npy", np.repeat(IMAGES[6], 3, -1))
    code, rows, _ = predict(tmp_path / "a.npy", "--fit")
    assert code == 0 and list(rows) == [str(tmp_path / "a.npy")]
    assert rows[str(tmp_path / "a.npy")][0]["class"] == str(LABELS[6])


def test_a_pattern_names_a_folder_and_what_is_in_it_once(predict, tmp_path):
    files = [save(tmp_path / "d" / name, IMAGES[0]) for name in ("a.png", "sub/b.png")]
    (tmp_path / "d" / "sub" / "c.webp").write_bytes(b"RIFF")
    code, rows, err = predict(f"{tmp_path}/d/**")
    assert (code, len(err)) == (1, 2) and list(rows) == [str(file) for file in files]
    (tmp_path / "empty").mkdir()
    code, rows, err = predict(f"{tmp_path}/emp*")
    assert (code, rows) == (1, {}) and "emp* holds no pictures" in err[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
def test_lists_of_names(end, predict, stdin, tmp_path):
    """With a byte order mark, from Windows, by `find -print0`, and of bytes that are no UTF-8."""
    names = [str(tmp_path / name) for name in ("ä.png", "b\u2028.png", "c\udce9.png")]
    for name, image in zip(names, IMAGES, strict=False):
        save(tmp_path / name, image)
    data = os.fsencode(end.join(names) + end)
    stdin((codecs.BOM_UTF8 if end != "\0" else b"") + data)
    code, rows, err = predict("-")
    assert (code, err) == (0, []) and len(rows) == 3


def test_a_home_that_there_is_not(predict):
    code, rows, err = predict("~nobody_of_this_name/a.png")
    assert (code, rows) == (1, {})
    assert err[0] == "~nobody_of_this_name/a.png cannot be read: No such file or directory"


def test_what_cannot_be_read_is_named(predict, stdin, tmp_path):
    good = save(tmp_path / "good.png", IMAGES[0])
    (tmp_path / "a.npy").write_bytes(b"")
    (tmp_path / "a.webp").write_bytes(b"RIFF")
    (tmp_path / "empty").mkdir()
    stdin(b"GIF89a\x00\xff")
    paths = ["missing.png", "*.bmp", "empty", "a.npy", "-", "good.png", "."]
    code, rows, err = predict(*(p if p == "-" else f"{tmp_path}/{p}" for p in paths))
    assert code == 1 and list(rows) == [str(good)]
    wanted = [
        "missing.png cannot be read: No such file or directory",
        f"no file is named like {tmp_path}/*.bmp",
        "empty holds no pictures",
        "a.npy cannot be read as an array: ",
        "standard input is no picture, no .npy and no list of files",
        "a.npy cannot be read as an array: ",
        "a.webp cannot be read: it is no whole picture",
        "7 could not be predicted",
    ]
    assert not [pair for pair in zip(wanted, err, strict=True) if pair[0] not in pair[1]]


def test_a_link_that_leads_back(predict, tmp_path):
    save(tmp_path / "a" / "1.png", IMAGES[0])
    save(tmp_path / "elsewhere" / "2.png", IMAGES[1])
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    code, rows, err = predict(tmp_path / "a")
    assert (code, err) == (0, [])
    assert list(rows) == [str(tmp_path / "a" / name) for name in ("1.png", "link/2.png")]


def test_pictures_are_resized_as_in_training(predict, tmp_path, workdir):
    large = np.kron(IMAGES[6, ..., 0], np.ones((3, 4), np.uint8))[..., None]
    file = save(tmp_path / "large.png", large)
    code, rows, err = predict(file)
    assert (code, rows) == (1, {}) and err[0] == (
        f"{file} has 24×32 pixels of 1 channel, and the model is for 8×8 pixels of 1 channel: "
        "--fit scales and converts it"
    )
    trained = runs.write_linear(tmp_path / "run", "data.resize=8")
    code, rows, _ = predict(file, model=trained / "model.safetensors")
    [classes] = rows.values()
    [values] = expected(resized(large, 8)[None], workdir)
    assert (code, classes[0]["probability"]) == (0, pytest.approx(values.max(), 1e-3))


def test_channels_are_converted_as_in_training(run_main, tmp_path):
    """Of a run that converted its own; others are refused."""
    colours = np.repeat(IMAGES[6], 3, -1)
    save(tmp_path / "a.png", colours)
    converting = runs.write_linear(tmp_path / "converting", "data.channels=1")
    code, out, err = run_main("predict", converting, tmp_path / "a.png", "--top=1")
    assert (code, err) == (0, "") and out.split()[0] == str(LABELS[6])
    keeping = runs.write_linear(tmp_path / "keeping")
    code, out, err = run_main("predict", keeping, tmp_path / "a.png")
    assert (code, out) == (1, "") and "8×8 pixels of 3 channels" in err


def test_fit_converts_size_and_colours(predict, tmp_path):
    alpha = np.full((8, 8, 1), 255, np.uint8)
    colours = np.concatenate([IMAGES[6]] * 3 + [alpha], -1)
    file = save(tmp_path / "rgba.png", np.kron(colours, np.ones((3, 3, 1), np.uint8)))
    code, rows, _ = predict(file, "--fit")
    assert code == 0 and rows[str(file)][0]["class"] == str(LABELS[6])


def test_fitted():
    grey = np.array([[[0, 255], [100, 0]]], np.uint8)  # the second is transparent
    assert fitted(grey, (1, 2, 3)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    deep = np.array([[[65535, 0, 0], [0, 0, 65535]]], np.uint16)
    assert fitted(deep, (1, 2, 1)).tolist() == [[[19595], [7471]]]
    assert fitted(deep, (3, 1, 3)).tolist() == [[[32768, 0, 32768]]] * 3
    with pytest.raises(ValueError, match="2 channels cannot become 5"):
        fitted(grey, (1, 2, 5))


def test_formats(run_main, workdir, tmp_path):
    file = save(tmp_path / 'a "b", c.png', IMAGES[0])
    code, out, _ = run_main("predict", workdir, file, "--format=csv", "--top=99")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["rank"] for row in rows] == [str(n) for n in range(1, 11)]
    assert {row["picture"] for row in rows} == {str(file)}
    assert {row["class"] for row in rows} == set(runs.DIGITS) and rows[0]["class"] == "0"
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)
    code, out, _ = run_main("predict", workdir, file, "--top=1")
    assert (code, out) == (0, f"0 {100 * float(rows[0]['probability']):5.1f} %   {file}\n")


def test_wrong_use(run_main, workdir, tmp_path):
    text = runs.write(tmp_path / "text", runs.tests_config("tiny_text"), classes=())
    for arguments, says in (
        ([tmp_path, "a.png"], "there is no trained model at"),
        ([text, "a.png"], "a nonlinear_transformer has no logits of images"),
        ([workdir, "a.png", "--top=0"], "--top is 0, and must be 1 or more"),
        ([workdir], "the following arguments are required: PATH"),
    ):
        code, out, err = run_main("predict", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def test_it_needs_neither_tfds_nor_grain(run_python):
    out = run_python(
        """
        import sys
        from terminator_jax import predict, prediction
        heavy = {"tensorflow_datasets", "grain", "orbax", "ml_collections", "sklearn"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert out == "[]\n"


def test_a_missing_package_is_named_with_its_extra(run_python):
    out = run_python(
        """
        import os, sys
        sys.modules["PIL"], sys.stderr = None, sys.stdout
        from terminator_jax import predict
        from terminator_jax.training import cli
        sys.argv[1:] = ["runs/digits", "a.png"]
        try:
            cli.run(predict.main, extra="predict")
        except SystemExit as ended:
            print(ended.code)
        """
    )
    assert out == "error: PIL is not installed: pip install 'terminator-jax[predict]'\n1\n"


def test_nobody_reads_the_output(run_python):
    """As after `| head`: no traceback."""
    run_python(
        """
        import os, sys
        from terminator_jax.training import cli
        read, write = os.pipe()
        os.dup2(write, 1), os.close(read), os.close(write)
        try:
            cli.run(lambda arguments: print("line", flush=True))
        except SystemExit as ended:
            assert ended.code == 1
        """
    )


def test_sequences_of_pictures_that_are_no_squares(run_main, tmp_path):
    """They are scaled as pictures: the file says which shape the sequences come from."""
    fields = ("model.options.size=(80,)", "data.sequence=True")
    rows, columns = 8, 10
    model = runs.write(
        tmp_path / "run", runs.tests_config("small", *fields), shape=(rows, columns, 1)
    )
    rng = np.random.default_rng(0)
    small, large = (
        rng.integers(256, size=(n * rows, n * columns, 1), dtype=np.uint8) for n in (1, 2)
    )
    files = [save(tmp_path / f"{n}.png", image) for n, image in enumerate((small, large))]
    code, out, _ = run_main("predict", model, *files, "--fit", "--format=jsonl", "--top=10")
    found = [json.loads(line)["classes"] for line in out.splitlines()]
    wanted = expected(np.stack([small, fitted(large, small.shape)]), model)
    assert code == 0
    for classes, values in zip(found, wanted, strict=True):
        for row in classes:
            assert row["probability"] == pytest.approx(values[int(row["class"])], abs=1e-6)
    with pytest.raises(ValueError, match=r"= \(8, 10, 1\), got \(1, 10, 8, 1\)"):
        terminator_jax.load_model(model).logits(np.zeros((1, columns, rows, 1), np.uint8))


def test_a_message_names_the_size_of_the_file(run_main, tmp_path):
    model = runs.write_linear(tmp_path / "run", "data.resize=8")
    file = save(tmp_path / "a.png", np.zeros((50, 100, 3), np.uint8))
    code, _, err = run_main("predict", model, file)
    assert code == 1 and "a.png has 50×100 pixels of 3 channels, and the model is for 8×8" in err
