"""Loads the trained model of a run, in one line of any program.

    import terminator_jax

    loaded = terminator_jax.load_model("runs/digits")
    names = [loaded.classes[n] for n in loaded.logits(pictures).argmax(-1)]

Training keeps its best model in `WORKDIR/model.safetensors`: the variables by their names, and in
the file's metadata the configuration, the names of the classes and the step.
"""

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from terminator_jax.atomic import replacing
from terminator_jax.classes import match
from terminator_jax.errors import one_line
from terminator_jax.layers.running import is_calibrated, use_batch_statistics
from terminator_jax.models import MODELS, make_config, preprocess
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.renamed import current_path

FILE_NAME = "model.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model and what is needed to use it; equal to itself alone, and hashable.

    Attributes:
      model: the NNX module, after `eval()`.
      model_config: the shape of the model, such as a `TerminatorConfig`.
      config: the configuration of the run, as plain dicts, tuples and values.
      classes: the names of the classes, in the order of the logits; empty for texts.
      step: the training step that it was saved at.
      shape: height, width and channels of a picture; None where the file does not say so: of texts
        and of older versions.
    """

    model: nnx.Module
    model_config: Any
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    step: int
    shape: tuple[int, int, int] | None = None

    def logits(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """Computes the logits of images.

        Images are evaluated in batches of `config["eval_batch_size"]`, the last one filled up from
        the beginning. Each gets the logits that it would get alone.

        Args:
          images: unsigned integers, `(batch, height, width, channels)`, of the size and the kind
            that the model was trained with; for CIFAR-10 uint8, `(batch, 32, 32, 3)`.

        Returns:
          `(batch, num_classes)`, in float32 or wider.

        Raises:
          TypeError: for images that are not of unsigned integers.
          ValueError: for images of another shape, or a model that is not for images.
        """
        size = self.config["eval_batch_size"]
        images = self.check(images)
        settings = tuple(
            (name, self.config["data"][name]) for name in ("mean", "std", "sequence", "permutation")
        )
        graph, state = nnx.split(self.model)
        rows = np.arange(-(-len(images) // size) * size) % max(len(images), 1)
        batches = [
            _logits(graph, settings, self.config["dtype"], state, images[batch])
            for batch in rows.reshape(-1, size)
        ]
        if not batches:
            return np.zeros((0, self.model_config.num_classes), np.float32)
        return np.concatenate([np.asarray(batch) for batch in batches])[: len(images)]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture.

        Where the file does not say so, sequences are squares, or rows if they are none.

        Raises:
          ValueError: for a model that is not for images.
        """
        shape = self.model_config
        if not hasattr(shape, "num_classes"):
            raise ValueError(
                f"a {self.config['model']['name']} has no logits of images: call loaded.model"
            )
        if self.shape:
            return self.shape
        if len(shape.size) == 2:
            return (*shape.size, shape.channels)
        [length] = shape.size
        side = math.isqrt(length)
        return (side, side, shape.channels) if side**2 == length else (1, length, shape.channels)

    def class_numbers(self, names: Sequence[str]) -> np.ndarray:
        """Returns the numbers that classes have in the logits, by their names.

        Args:
          names: those of other data, in the order of its labels.

        Raises:
          ValueError: if the model lacks one of them.
        """
        return match(names, self.classes)

    def baked(self) -> "LoadedModel":
        """Returns this with its model baked, for faster inference, or itself if it cannot be.

        See `Terminator.bake`; models without slow networks and causal ones cannot be baked.
        """
        model = self.model
        if not hasattr(model, "bake") or model.config.causal or not is_calibrated(model):
            return self
        return dataclasses.replace(self, model=model.bake())

    def inputs(self, images: jax.Array) -> jax.Array:
        """Computes what the model sees of images: normalized, and as a sequence if it is for those.

        It is pure, for `jax.jit` and `jax.export`.

        Args:
          images: as those of `logits`.
        """
        data = self.config["data"]
        return preprocess(
            images, mean=data["mean"], std=data["std"], sequence=data["sequence"],
            permutation=data["permutation"], dtype=at_least_float32(self.config["dtype"]),
        )  # fmt: skip

    def check(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """Returns images as a NumPy array; raises what `logits` raises if they do not fit."""
        wanted = self.picture_shape
        images = np.asarray(images)
        if images.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"expected images of uint8 or uint16, got {images.dtype}")
        fits = images.ndim == 4 and images.shape[1:] == wanted
        if self.config["data"]["sequence"] and not self.shape and images.ndim == 4:
            pixels = math.prod(images.shape[1:3])
            fits = (pixels, images.shape[3]) == (math.prod(wanted[:2]), wanted[2])
        if not fits:
            raise ValueError(
                "expected images (batch, height, width, channels) with (height, width, channels)"
                f" = {wanted}, got {images.shape}"
            )
        return images


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(
    graph: nnx.GraphDef, settings: tuple, dtype: str, state: nnx.State, images: jax.Array
) -> jax.Array:
    wide = at_least_float32(dtype)
    return nnx.merge(graph, state)(preprocess(images, dtype=wide, **dict(settings)))


def load_model(path: str | os.PathLike) -> LoadedModel:
    """Loads the best model of a run.

    Args:
      path: the directory of the run, or a file `model.safetensors` of one.

    Raises:
      ValueError: if there is no such file, or it holds no model of this package.

    Example:
      >>> load_model("runs/nothing")
      Traceback (most recent call last):
      ...
      ValueError: there is no trained model at runs/nothing/model.safetensors: ...
    """
    file = model_file(Path(path))
    if not file.is_file():
        raise ValueError(
            f"there is no trained model at {file}: training writes it at the end of an epoch, and"
            " `python -m terminator_jax.evaluate` for a run of an older version"
        )
    variables, metadata = _read(file)
    values = sum(array.size for array in variables.values())
    config, model_config, classes, step, shape = _described(file, metadata, values)
    model = _build(model_config, config, variables, file)
    model.eval()
    if not is_calibrated(model):
        use_batch_statistics(model)
        warnings.warn(
            f"{file} has no running averages, so that the logits of an image depend on the others "
            "in its batch: terminator_jax.calibrate(loaded.model, batches) computes them",
            stacklevel=2,
        )
    return LoadedModel(model, model_config, config, classes, step, shape)


def model_file(path: Path) -> Path:
    """Returns the file of a model that is named by itself or by the directory of its run."""
    return path if path.suffix == ".safetensors" or path.is_file() else path / FILE_NAME


def save_model(
    path: Path,
    state: nnx.State,
    *,
    config: str,
    classes: Sequence[str],
    step: int,
    shape: Sequence[int] | None = None,
) -> None:
    """Writes a model's file whole or not at all; `load_model` reads it.

    Args:
      path: the file.
      state: the variables of the model, such as `nnx.state(model)`.
      config: the configuration of the run, as JSON text.
      classes: the names of the classes, in the order of the logits.
      step: the step of training.
      shape: height, width and channels of a picture, if it is for pictures.
    """
    metadata = {"config": config, "classes": json.dumps(list(classes)), "step": str(step)}
    if shape:
        metadata["shape"] = json.dumps(list(shape))
    # The format writes memory as it lies, whatever the strides.
    arrays = {name: np.asarray(x, order="C") for name, x in _by_name(state).items()}
    content = safetensors.numpy.save(arrays, metadata)
    with replacing(path) as partial:
        partial.write_bytes(content)


def _by_name(state: nnx.State) -> dict[str, Any]:
    """Returns the arrays of a state by dotted names, without the counters of random streams."""
    kept = nnx.filter_state(state, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(kept)}


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(file, "np") as content:
            metadata = content.metadata() or {}
            arrays = {
                ".".join(current_path(tuple(name.split(".")))): content.get_tensor(name)
                for name in content.keys()  # noqa: SIM118
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if missing := {"config", "classes", "step"} - metadata.keys():
        raise ValueError(f"{file} holds no model of this package: no {', '.join(sorted(missing))}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{file} is damaged: {name} is not of finite numbers")
    return arrays, metadata


def _described(
    file: Path, metadata: Mapping[str, str], values: int
) -> tuple[dict[str, Any], Any, tuple[str, ...], int, tuple[int, int, int] | None]:
    """Returns the configuration, that of the model, the classes, the step and the pictures' shape.

    Args:
      file: for messages.
      metadata: what the file says of itself, which nobody need trust.
      values: how many numbers it holds; a larger one in the model's options cannot be true, and
        would take all the memory there is.
    """
    try:
        config = lists_to_tuples(json.loads(metadata["config"]))
        names, classes = config["model"], json.loads(metadata["classes"])
        jnp.dtype(config["dtype"]), config["data"]["mean"], config["data"]["std"]
        if _largest(names["options"]) > values:
            raise ValueError(f"config.model.options are for more than its {values:,} values")
        model_config = make_config(names["name"], names["variant"], names["options"])
        shape = tuple(json.loads(metadata["shape"])) if "shape" in metadata else None
        if shape and not _is_shape_of(shape, model_config):
            raise ValueError(f"pictures of {shape} are not those of its model")
        return config, model_config, tuple(map(str, classes)), int(metadata["step"]), shape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{file} holds no model of this package: {problem}") from error


def _is_shape_of(shape: tuple, model_config: Any) -> bool:
    """Returns whether a model takes pictures of a shape, as maps or as sequences of pixels."""
    *size, channels = shape
    positions = (tuple(size), (math.prod(size),))
    whole = all(isinstance(n, int) and n > 0 for n in shape)
    fits = tuple(model_config.size) in positions and channels == model_config.channels
    return len(shape) == 3 and whole and fits


def _largest(value: Any) -> float:
    """Returns the largest number and the greatest length inside a value of JSON."""
    if isinstance(value, Mapping | tuple):
        inside = value.values() if isinstance(value, Mapping) else value
        return max(len(value), *map(_largest, inside), 0)
    return value if isinstance(value, int) else 0


def _build(
    model_config: Any, config: Mapping[str, Any], variables: dict[str, np.ndarray], file: Path
) -> nnx.Module:
    """Builds the model that the configuration describes, with the variables' values."""
    dtype = jnp.dtype(config["dtype"])
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError(f"{file} holds a model of float64, which needs JAX_ENABLE_X64=1")

    def make() -> nnx.Module:
        param_dtype = at_least_float32(dtype)
        return MODELS[config["model"]["name"]].module(
            model_config, dtype=dtype, param_dtype=param_dtype, axis_name=None, remat=False,
            rngs=nnx.Rngs(0),
        )  # fmt: skip

    try:
        model = nnx.eval_shape(make)
    except Exception as error:  # whatever the options of somebody else make a model raise
        problem = one_line(error)
        raise ValueError(f"{file} holds no model of this package: {problem:.200}") from error
    state = nnx.state(model)
    wanted = {name: (x.shape, x.dtype) for name, x in _by_name(state).items()}
    found = {name: (x.shape, x.dtype) for name, x in variables.items()}
    averages = {name: wanted[name] for name in _by_name(nnx.state(model, nnx.BatchStat))}
    if wanted not in (found, found | averages):
        raise ValueError(f"{file} does not fit its own configuration: it is of another version")
    if len(jax.tree.leaves(state)) > len(found):
        # Random streams, such as those of nnx.Dropout, are not in the file, and running averages
        # not in one of a version before they were kept.
        model = make()
    state = nnx.state(model, nnx.Not(nnx.RngState))
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name in variables:
            variable.set_value(jnp.asarray(variables[name]))
    nnx.update(model, state)
    return model


def lists_to_tuples(value: Any) -> Any:
    """Turns JSON's lists back into tuples, at every depth."""
    if isinstance(value, dict):
        return {name: lists_to_tuples(item) for name, item in value.items()}
    return tuple(map(lists_to_tuples, value)) if isinstance(value, list) else value
