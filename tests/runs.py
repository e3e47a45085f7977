"""Files of trained models, made in a moment: nothing is trained."""

import functools
from pathlib import Path

import numpy as np
from flax import nnx
from nets import count_a_batch
from sklearn.datasets import load_digits

from terminator_jax.loading import FILE_NAME, save_model
from terminator_jax.models import MODELS, make_config
from terminator_jax.training import config as configs

DIGITS = tuple("0123456789")


def tests_config(name, *fields):
    """The configuration in a file of tests/training."""
    path = Path(__file__).parent / "training" / f"{name}.py"
    return configs.read(path, [f"--config.{field}" for field in fields])


def write(workdir, config, change=lambda model: None, classes=DIGITS, shape=None):
    """Writes the model of a configuration as training would; `change` sets what it learned."""
    names = config.model
    model_config = make_config(names.name, names.variant, names.options.to_dict())
    model = MODELS[names.name].module(
        model_config, dtype=None, param_dtype=np.float32, axis_name=None, remat=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    change(model)
    count_a_batch(model)
    workdir.mkdir(exist_ok=True)
    text = configs.to_json(config)
    save_model(
        workdir / FILE_NAME, nnx.state(model), config=text, classes=classes, step=7, shape=shape
    )
    return workdir


def write_linear(workdir, *fields):
    """A linear model of the digits by least squares, whose logits do not depend on the batch."""
    config = tests_config("small", *fields)
    x, labels = pictures()
    x = (x.reshape(len(x), -1) / 255 - config.data.mean[0]) / config.data.std[0]
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = 5 * np.linalg.lstsq(x, np.eye(10)[labels], rcond=None)[0]

    def change(model):
        model.linear.kernel[...] = weights[:-1]
        model.linear.bias[...] = weights[-1]

    return write(workdir, config, change)


@functools.cache
def pictures():
    """The digits of scikit-learn, uint8 `(1797, 8, 8, 1)`, and what they are."""
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target
