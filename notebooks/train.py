# %% [markdown]
# # Train a slow-fast network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/terminator-jax/blob/main/notebooks/train.ipynb)
#
# A **slow network** turns coordinates into kernels as large as the picture. A **fast network**
# multiplies these *hyper-kernels* with its own activations, so that every layer sees the whole
# picture: without attention, residuals or downsampling. The network built from such layers is
# called Terminator.
#
# This notebook trains it twice, on handwritten digits and on CIFAR-10. It draws the curves, looks
# at predictions, and shows the hyper-kernels before and after training.

# %%
# Installs the package where it is missing, and shows which devices there are.
try:
    import terminator_jax
except ImportError:
    import importlib.util
    import subprocess
    import sys

    # A newer jax, if one is needed, shall be for the same devices.
    parts = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13", "libtpu": "tpu"}
    extras = ["train", *(parts[name] for name in parts if importlib.util.find_spec(name))]
    package = f"terminator-jax[{','.join(extras)}] @ git+https://github.com/OWNER/terminator-jax"
    command = [sys.executable, "-m", "pip", "install", "--quiet", package, "matplotlib"]
    subprocess.run(command, check=True)
    import terminator_jax

import logging
import os

import jax

logging.getLogger("absl").setLevel("ERROR")  # TFDS and orbax tell much
jax.config.update("jax_num_cpu_devices", 2)  # so that `pmap` has two cores on a CPU too
kind = jax.devices()[0].device_kind
print(f"terminator_jax {terminator_jax.__version__} on {jax.device_count()} × {kind}")

# %% [markdown]
# ## How much to train
# This is the only switch. `"part"` takes some minutes on a CPU: a small network and a part of
# CIFAR-10. `"whole"` is the published network on all of CIFAR-10, for a GPU or TPU.

# %%
SIZE = "part" if jax.default_backend() == "cpu" else "whole"
SIZE = os.environ.get("NOTEBOOK_SIZE", SIZE)  # the test of this notebook asks for "tiny"
print(SIZE)

# %% [markdown]
# ## Digits, in about two minutes
# An experiment is a configuration: `read` takes its name, and changes to it as on the command
# line. `train` does what `python -m terminator_jax.train --config=digits` does. The data are 1,797
# pictures of 8×8 pixels that come with scikit-learn. On a CPU, half of the time goes to compiling.

# %%
from pathlib import Path

from terminator_jax.training import config, loop


def smaller(*factors):
    """Options of a network with a block for each factor, and nothing between them."""
    n = len(factors)
    options = dict(factors=factors, skips=((),) * n, dropout=(0.0,) * n, global_layers=(2,) * n)
    return [f"--config.model.options.{name}={value}" for name, value in options.items()]


epochs = {"whole": 30, "part": 10, "tiny": 2}[SIZE]
changes = [f"--config.epochs={epochs}", "--config.optimizer.warmup_epochs=1"]
digits = config.read("digits", changes + (smaller(12) if SIZE == "tiny" else []))
outcome = loop.train(digits, Path("runs/notebook-digits"))
print(f"best: {outcome.best['accuracy']:.1%} of the test pictures")

# %% [markdown]
# The same call again goes on from the last checkpoint, or says that it is done.
#
# ## Curves
# A run writes its numbers to `log.jsonl`, one JSON object a line.

# %%
import json

import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 16, "lines.linewidth": 3, "figure.constrained_layout.use": True})


def draw_curves(workdir):
    lines = [json.loads(line) for line in Path(workdir, "log.jsonl").read_text().splitlines()]
    for kind, name in (("train", "training"), ("eval", "test")):
        rows = [line for line in lines if line["kind"] == kind]
        plt.plot([r["step"] for r in rows], [100 * r["accuracy"] for r in rows], label=name)
    plt.gcf().set_size_inches(6, 4)
    plt.xlabel("step")
    plt.ylabel("accuracy, %")
    plt.legend()
    plt.show()


draw_curves("runs/notebook-digits")

# %% [markdown]
# ## A few test pictures
# `load_model` gives the best model of a run in one line. It needs neither the data nor the
# trainer. It standardizes by the running averages of training: what it says of a picture does not
# depend on the others in its batch.

# %%
import numpy as np

from terminator_jax.data.sources import open_split


def draw_predictions(workdir, pictures):
    loaded = terminator_jax.load_model(workdir)
    predicted = loaded.logits(pictures.image).argmax(-1)
    print(f"{np.mean(predicted == pictures.label):.1%} of {len(pictures):,} are right")
    _, axes = plt.subplots(2, 4, figsize=(6, 3.6))
    rows = np.random.default_rng(0).choice(len(pictures), axes.size, replace=False)
    for axis, n in zip(axes.flat, rows, strict=True):
        right = predicted[n] == pictures.label[n]
        axis.imshow(pictures.image[n], cmap="gray_r")
        title = f"{'✓' if right else '✗'} {loaded.classes[predicted[n]]}"
        axis.set_title(title, color="green" if right else "red", fontsize=13)
        axis.axis("off")
    plt.show()


draw_predictions("runs/notebook-digits", open_split("digits", "test").load())

# %% [markdown]
# Above each picture is what the network says it is, in green where that is right.
#
# ## Hyper-kernels, before and after
# Every block has as many hyper-kernels as its input has channels, each as large as the picture.
# These are the first three of the last block, as they begin and as trained. They begin as noise:
# at the published frequency scale, ω₀ = 2000, neighbouring positions have nothing in common.
#
# Each row has a colour scale of its own. The number beside it is the standard deviation.

# %%
from flax import nnx

from terminator_jax.models import Terminator


def draw_kernels(workdir):
    loaded = terminator_jax.load_model(workdir)
    start = Terminator(loaded.model.config, rngs=nnx.Rngs(loaded.config["seed"]))
    _, axes = plt.subplots(2, 3, figsize=(6, 4.2))
    for row, name, model in zip(axes, ("before", "after"), (start, loaded.model), strict=True):
        kernels = model.blocks[-1].slow_net()
        limit = 4 * float(kernels.std())
        for axis, kernel in zip(row, np.moveaxis(kernels, -1, 0), strict=False):
            axis.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\n± {kernels.std():.3f}")
    plt.show()


draw_kernels("runs/notebook-digits")

# %% [markdown]
# ## CIFAR-10, on all cores
# `parallel="pmap"` is the default: every device has the whole network, takes an equal part of each
# batch, and averages gradients and statistics with the others. A TPU of 8 cores needs no other
# line than a CPU. CIFAR-10 is downloaded if it is not there (170 MB).

# %%
CHANGES = {
    "whole": ["--config.epochs=6", "--config.optimizer.warmup_epochs=0.5"],
    "part": [
        "--config.epochs=4",
        "--config.optimizer.warmup_epochs=0.5",
        "--config.data.train_split=train[:3000]",
        "--config.data.eval_split=test[:400]",
        *smaller(4, 2),
    ],
    "tiny": ["--config.epochs=1", "--config.optimizer.warmup_epochs=0", *smaller(4)],
}
cifar = config.read("cifar10", CHANGES[SIZE])
outcome = loop.train(cifar, Path("runs/notebook-cifar10"))
print(f"best: {outcome.best['accuracy']:.1%} of the test pictures")
draw_curves("runs/notebook-cifar10")

# %% [markdown]
# A part of the data and a small network are far from the whole: six epochs of the published
# network reached 86 % in 3½ minutes on an H100. The kernels show something all the same. Where
# training went on for long enough, they are no longer noise: areas of one sign appear.

# %%
draw_predictions("runs/notebook-cifar10", open_split("cifar10", cifar.data.eval_split).load())
draw_kernels("runs/notebook-cifar10")

# %% [markdown]
# ## What to try next
# - Other experiments: `config.read("mnist")`, `"cifar100"`, `"stl10"`, `"lambda_digits"`, or a
#   file of your own.
# - Your own pictures: `config.read("cifar10", ["--config.data.name=pictures",
#   "--config.data.resize=32"])`, where the folder `pictures` has one folder for each class.
# - Another frequency scale, `"--config.model.options.omega0=2.0"`, and look at the kernels again.
#   The notebook [kernels_and_context](kernels_and_context.ipynb) says more about them.
# - Single layers in your own Flax model: the notebook [layers](layers.ipynb).
