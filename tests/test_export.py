"""Exported files give the same logits where nothing of this package is installed."""

import json
import os
import zipfile

import jax
import numpy as np
import pytest
import runs
from jax import export

import terminator_jax
from terminator_jax import exporting

IMAGES, _ = runs.pictures()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small Terminator with its initial values."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return runs.write(folder, runs.tests_config("tiny"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """It takes pictures as sequences."""
    return runs.write_linear(tmp_path_factory.mktemp("runs") / "linear", "data.sequence=True")


def lines_of(file):
    """The Python in the README of an exported file, which the documentation shows too."""
    with zipfile.ZipFile(file) as archive:
        readme = archive.read("README.txt").decode()
    return "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))


def test_stablehlo_where_only_jax_is_installed(
    workdir, run_main, run_python, unoptimized, tmp_path
):
    """By the lines in the file; batches of several sizes with one program."""
    file = tmp_path / "tiny.zip"
    code, out, _ = run_main("export", workdir, file)
    assert code == 0 and out.startswith(f"{file}: stablehlo, ")
    np.savez(tmp_path / "pictures.npz", *(IMAGES[:n] for n in (1, 5)))
    lines = lines_of(file).replace('"tiny.zip"', repr(str(file)))
    code = [
        "import sys",
        "from importlib.machinery import PathFinder",
        "class OnlyZips:  # as if flatbuffers were not installed",
        "    def find_spec(name, path=None, target=None):",
        "        if name == 'flatbuffers':",
        "            zips = [path for path in sys.path if path.endswith('.zip')]",
        "            if not (found := PathFinder.find_spec(name, zips)):",
        "                raise ImportError(name)",
        "            return found",
        "sys.meta_path.insert(0, OnlyZips)",
        "blocked = ['absl', 'flax', 'optax', 'orbax', 'safetensors', 'terminator_jax', 'PIL']",
        "sys.modules.update(dict.fromkeys(blocked))",
        "import numpy as np",
        f"stored = np.load({str(tmp_path / 'pictures.npz')!r})",
        "found = []",
        "for pictures in stored.values():",
        *("    " + line for line in lines.splitlines()),
        "    assert len(names) == len(pictures) and set(names) <= set('0123456789')",
        "    found.append(logits)",
        f"np.savez({str(tmp_path / 'logits.npz')!r}, *found)",
    ]
    run_python("\n".join(code), optimize=False)
    loaded = terminator_jax.load_model(workdir)
    expected = jax.jit(exporting.logits_of(loaded))
    for count, logits in zip((1, 5), np.load(tmp_path / "logits.npz").values(), strict=True):
        np.testing.assert_allclose(logits, expected(IMAGES[:count]), atol=1e-3)


# In a process of its own: the converter replaces functions of jax.numpy for good.
ONNX = """
    import warnings

    warnings.simplefilter("ignore")  # what the converter imports warns of much
    import sys
    import jax2onnx
    import runs
    from terminator_jax import export
    from terminator_jax.training import cli

    runs.tests_config("small")
    convert, factor = jax2onnx.to_onnx, {factor}
    jax2onnx.to_onnx = lambda f, *args, **options: convert(
        lambda x: factor * f(x) if factor != 1 else f(x), *args, **options
    )
    sys.argv[1:], sys.stderr = [{source!r}, {file!r}, "--opset=21"], sys.stdout
    try:
        cli.run(export.main)
    except SystemExit as ended:
        print("exit code", ended.code)
"""


@pytest.fixture
def converter(run_python):
    """Skips where the converter is missing, or does not know this version of jax yet."""
    pytest.importorskip("jax2onnx", reason="the extra onnx is not installed")
    says = run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import jax, jax2onnx
        try:
            jax2onnx.to_onnx(lambda x: jax.jit(jax.nn.gelu)(jax.nn.silu(x)), [(2, 3)])
        except Exception as error:
            print(error)
        """
    )
    if says:
        pytest.skip(f"jax2onnx does not work with this version of jax: {says}")


def test_onnx(converter, workdir, run_python, unoptimized, tmp_path):
    """The whole of a Terminator, by ONNX Runtime; batches of several sizes."""
    onnx, onnxruntime = map(pytest.importorskip, ("onnx", "onnxruntime"))
    file = tmp_path / "tiny.onnx"
    out = run_python(ONNX.format(factor=1, source=str(workdir), file=str(file)), optimize=False)
    assert onnx.load(file).opset_import[0].version == 21
    assert out.startswith(f"{file}: onnx, ") and out.endswith("exit code 0\n")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(runs.DIGITS)
    expected = jax.jit(exporting.logits_of(terminator_jax.load_model(workdir)))
    for count in (1, 5):
        [logits] = session.run(["logits"], {"pictures": IMAGES[:count]})
        np.testing.assert_allclose(logits, expected(IMAGES[:count]), atol=1e-3)


def test_onnx_that_gives_other_logits_is_not_written(converter, linear, run_python, tmp_path):
    file = tmp_path / "linear.onnx"
    out = run_python(ONNX.format(factor=1.01, source=str(linear), file=str(file)))
    assert "its logits differ by " in out and out.endswith("exit code 2\n")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_is(linear, run_main, tmp_path):
    file = tmp_path / "linear"
    code, _, _ = run_main("export", linear, file, "--format=stablehlo", "--bits=16")
    with zipfile.ZipFile(file) as archive:
        about = json.loads(archive.read("model.json"))
        program = archive.read("model.stablehlo")
    assert code == 0 and about["classes"] == list(runs.DIGITS) and about["step"] == 7
    assert about["input"] == {"dtype": "uint16", "shape": ["batch", 8, 8, 1]}
    assert about["normalization"] == {"largest": 65535, "mean": [0.305], "std": [0.376]}
    exported = export.deserialize(bytearray(program))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals) == "(ShapedArray(uint16[batch,8,8,1]),)"


def test_safetensors(linear, run_main, tmp_path):
    file = tmp_path / "copy.safetensors"
    code, out, _ = run_main("export", linear, file)
    assert code == 0 and out.startswith(f"{file}: safetensors, ")
    copy, loaded = terminator_jax.load_model(file), terminator_jax.load_model(linear)
    assert copy.config == loaded.config
    assert (copy.logits(IMAGES[:9]) == loaded.logits(IMAGES[:9])).all()


def test_wrong_use(run_main, linear, tmp_path):
    text = runs.write(tmp_path / "text", runs.tests_config("tiny_text"), classes=())
    for arguments, says in (
        ([tmp_path, "a.zip"], "there is no trained model at"),
        ([text, "a.zip"], "a nonlinear_transformer has no logits of images"),
        ([linear, tmp_path / "no" / "a.zip"], "a.zip cannot be written: No such file or directory"),
        ([linear, tmp_path, "--format=safetensors"], "cannot be written: Is a directory"),
        ([linear, "a.zip", "--format=pb"], "invalid choice: 'pb'"),
        ([linear, "a.zip", "--opset=21"], "--opset is 21, and must be 1 or more, for an .onnx"),
    ):
        code, out, err = run_main("export", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert not [*tmp_path.glob(".*"), *tmp_path.parent.glob(".*")]


def test_places_that_are_no_ordinary_file(linear, run_main, tmp_path):
    """Pipes and devices stay what they are, and of a link the file behind it is written."""
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run_main("export", linear, tmp_path / "pipe", "--format=safetensors")
    assert code == 2 and f"{tmp_path / 'pipe'} is no file, and is left as it is" in err
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "weights.bin")
    code, _, _ = run_main("export", linear, tmp_path / "link", "--format=safetensors")
    assert code == 0 and (tmp_path / "link").is_symlink()
    assert terminator_jax.load_model(tmp_path / "weights.bin").step == 7


def test_names_of_files(linear, run_main, tmp_path):
    file = tmp_path / "SHAPE DTYPE.ZIP"
    code, out, _ = run_main("export", linear, file)
    assert code == 0 and ": stablehlo, " in out and '"SHAPE DTYPE.ZIP"' in lines_of(file)
    code, out, _ = run_main("export", linear, tmp_path / "A.SAFETENSORS")
    assert code == 0 and ": safetensors, " in out


def test_a_missing_package_is_named_with_its_extra(run_python):
    out = run_python(
        """
        import sys
        sys.modules["flatbuffers"], sys.stderr = None, sys.stdout
        from terminator_jax import export
        from terminator_jax.training import cli
        sys.argv[1:] = ["runs/digits", "digits.zip"]
        try:
            cli.run(export.main, extra="export")
        except SystemExit as ended:
            print(ended.code)
        """
    )
    assert out == "error: flatbuffers is not installed: pip install 'terminator-jax[export]'\n1\n"
