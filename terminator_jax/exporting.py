"""Writes trained models as files that other programs run.

What is written takes pictures as uint8 and gives logits: normalization is inside.
"""

import importlib.resources
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import jax
import numpy as np
from jax import export

import terminator_jax
from terminator_jax.atomic import replacing
from terminator_jax.errors import InputError, one_line
from terminator_jax.loading import LoadedModel, model_file
from terminator_jax.ops.platform import only

ONNX_TOLERANCE = 1e-3  # of the largest logit
PLATFORMS = ("cpu", "cuda", "tpu")
ABOUT, PROGRAM, README = "model.json", "model.stablehlo", "README.txt"
LINES = f"""\
A trained classifier of pictures. With jax and numpy installed:

    import json, sys, zipfile
    import jax.export, numpy as np

    sys.path.append("NAME")  # holds flatbuffers, which jax.export needs
    with zipfile.ZipFile("NAME") as file:
        about = json.loads(file.read("{ABOUT}"))
        model = jax.jit(jax.export.deserialize(file.read("{PROGRAM}")).call)
    logits = model(pictures)  # DTYPE, (batch, SHAPE); any batch
    names = [about["classes"][n] for n in np.argmax(logits, -1)]

The folder flatbuffers is Google's package of that name, under the Apache License 2.0.
"""


def write_stablehlo(loaded: LoadedModel, file: Path, *, dtype=np.uint8) -> None:
    """Writes a zip of the program by `jax.export`, what it is in JSON, and the lines that load it.

    The program is for CPU, CUDA and TPU, and for any batch. The zip also holds the package
    flatbuffers: `jax.export` needs it, and who has only jax does not have it.

    Args:
        loaded: the model.
        file: the zip.
        dtype: of pictures, uint8 or uint16.
    """
    dtype = np.dtype(dtype)
    [batch] = export.symbolic_shape("batch")
    pictures = jax.ShapeDtypeStruct((batch, *loaded.picture_shape), dtype)
    exported = export.export(jax.jit(logits_of(loaded)), platforms=PLATFORMS)(pictures)
    shape = ", ".join(map(str, loaded.picture_shape))
    lines = LINES.replace("DTYPE", dtype.name).replace("SHAPE", shape).replace("NAME", file.name)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(README, lines)
        archive.writestr(ABOUT, json.dumps(describe(loaded, dtype), indent=2) + "\n")
        archive.writestr(PROGRAM, bytes(exported.serialize()))
        for module in importlib.resources.files(flatbuffers).iterdir():
            if module.name.endswith(".py"):
                archive.writestr(f"flatbuffers/{module.name}", module.read_bytes())
    _write(file, content.getvalue())


def write_onnx(loaded: LoadedModel, file: Path, *, dtype=np.uint8, opset: int = 23) -> None:
    """Writes an ONNX file: input `pictures`, output `logits`, what it is in its metadata.

    ONNX Runtime must give the model's own logits, or nothing is written.

    Args:
        loaded: the model.
        file: the ONNX file.
        dtype: of pictures, uint8 or uint16.
        opset: the version of ONNX's operators.

    Raises:
        InputError: if jax2onnx cannot convert the model, or converts it wrongly.
    """
    import jax2onnx
    import onnx

    dtype, logits = np.dtype(dtype), logits_of(loaded)
    pictures = jax.ShapeDtypeStruct(("batch", *loaded.picture_shape), dtype)
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each warns of hundreds of things
    try:
        with only("tpu"):  # by XLA's convolutions and matrix products, which ONNX has too
            model = jax2onnx.to_onnx(
                logits, [pictures], opset=opset, input_names=["pictures"], output_names=["logits"]
            )
        about = {name: json.dumps(value) for name, value in describe(loaded, dtype).items()}
        onnx.helper.set_model_props(model, about)
        content = model.SerializeToString()
        _check_onnx(content, logits, loaded.picture_shape, dtype)
    except Exception as error:  # the converter and the runtime raise many kinds
        words = one_line(error)[:200]
        raise InputError(
            f"jax2onnx does not convert this model: {words}: export it as stablehlo"
        ) from error
    _write(file, content)


def _check_onnx(content: bytes, logits: Callable, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError if ONNX Runtime gives other logits than JAX, for batches of two sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # nothing but what ends the process
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    pictures = random.integers(0, np.iinfo(dtype).max, (3, *shape), dtype, endpoint=True)
    expected = np.asarray(jax.jit(logits)(pictures))
    for count in (1, 3):
        [found] = session.run(["logits"], {"pictures": pictures[:count]})
        difference = np.abs(found - expected[:count]).max() / np.abs(expected).max()
        if not difference < ONNX_TOLERANCE:
            raise ValueError(f"its logits differ by {difference:.1e} of the largest")


def copy_safetensors(model: Path, file: Path) -> None:
    """Copies the weights of a run, with the configuration in their metadata.

    Args:
        model: the directory of the run, or its file.
        file: the copy.
    """
    _write(file, model_file(model).read_bytes())


def _write(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all; of a link, what it leads to."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file() and not file.is_dir():
        raise InputError(f"{file} is no file, and is left as it is: choose another place")
    with replacing(file) as partial:
        partial.write_bytes(content)


def logits_of(loaded: LoadedModel) -> Callable[[jax.Array], jax.Array]:
    """Returns the pure function from pictures, as they are stored, to logits; baked."""
    loaded = loaded.baked()
    return lambda images: loaded.model(loaded.inputs(images))


def describe(loaded: LoadedModel, dtype: np.dtype) -> dict[str, Any]:
    """Returns what a user of the file wants to know, as JSON takes it."""
    data = loaded.config["data"]
    return {
        "classes": loaded.classes,
        "input": {"dtype": dtype.name, "shape": ["batch", *loaded.picture_shape]},
        "output": {"name": "logits", "shape": ["batch", loaded.model_config.num_classes]},
        # What the program does first.
        "normalization": {"largest": np.iinfo(dtype).max, "mean": data["mean"], "std": data["std"]},
        "platforms": PLATFORMS,
        "model": loaded.config["model"],
        "step": loaded.step,
        "versions": {"jax": jax.__version__, "terminator_jax": terminator_jax.__version__},
    }
