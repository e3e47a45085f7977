# %% [markdown]
# # Layers in a model of your own
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/terminator-jax/blob/main/notebooks/layers.ipynb)
#
# Four ways to let every position of a picture meet all others, each put into the same small Flax
# model in place of a 3×3 convolution: a **HyperZZW** layer, an **SFNE block**, a convolution with
# a kernel larger than the picture by **`fft_conv`**, and a **lambda layer**. First in Flax NNX,
# one at a time, then all four in Flax Linen.

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
kind = jax.devices()[0].device_kind
print(f"terminator_jax {terminator_jax.__version__} on {jax.device_count()} × {kind}")

# %% [markdown]
# ## Data
# The handwritten digits of scikit-learn: 1,437 pictures to train on, 360 to test, of 8×8 pixels.

# %%
import numpy as np

from terminator_jax.data.sources import open_split

TINY = os.environ.get("NOTEBOOK_SIZE") == "tiny"  # only in the test of this notebook
EPOCHS = 1 if TINY else 10


def digits(split):
    pictures = open_split("digits", split).load()
    return (pictures.image / 255).astype(np.float32), pictures.label


train_x, train_y = digits("train")
test_x, test_y = digits("test")
print(train_x.shape, test_x.shape)

# %% [markdown]
# ## The model
# Nothing in it is special: a convolution, a layer to be exchanged, the mean over space, a linear
# layer.

# %%
import jax.numpy as jnp
import optax
from flax import nnx

from terminator_jax import layers
from terminator_jax.ops import fft_conv

SIZE, CHANNELS = (8, 8), 24
BRANCHES = layers.BRANCHES[: 1 if TINY else 4]  # the local kernels of an SFNE block


class Net(nnx.Module):
    def __init__(self, middle, rngs):
        self.stem = nnx.Conv(1, CHANNELS, (3, 3), rngs=rngs)
        self.middle = middle
        self.norm = layers.InstanceStandardization()
        self.head = nnx.Linear(CHANNELS, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.norm(self.stem(x)))
        x = nnx.gelu(self.middle(x))
        return self.head(x.mean((1, 2)))


# %% [markdown]
# ## The layers
# All take `(batch, rows, columns, channels)`. `GlobalHyperZZW` takes two maps: one is multiplied
# with the hyper-kernel of a slow network, and then meets the other. Here both are the same.
# `fft_conv` is a function, so that the parameter is ours.


# %%
class HyperZZW(nnx.Module):
    def __init__(self, rngs):
        self.layer = layers.GlobalHyperZZW(SIZE, CHANNELS, rngs=rngs)
        self.norm = layers.InstanceStandardization()
        self.mix = layers.pointwise(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return self.mix(self.norm(self.layer(x, x)))


class LargeConvolution(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (15, 15, CHANNELS)))
        self.mix = layers.pointwise(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return self.mix(fft_conv(x, self.kernel[...]))


MIDDLES = {
    "convolution 3×3": lambda rngs: nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs),
    "fft_conv 15×15": LargeConvolution,
    "HyperZZW": HyperZZW,
    "lambda layer": lambda rngs: layers.LambdaLayer(CHANNELS, CHANNELS, size=SIZE, rngs=rngs),
    "SFNE block": lambda rngs: layers.SFNEBlock(SIZE, CHANNELS, 1, branches=BRANCHES, rngs=rngs),
}

# %% [markdown]
# ## Training
# An ordinary loop with optax. `eval()` lets the lambda layer use its running statistics, as it
# does for Flax's own layers.


# %%
@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def accuracy(model):
    return jnp.mean(model(test_x).argmax(-1) == test_y)


def batches(epoch, size=64):
    order = np.random.default_rng(epoch).permutation(len(train_x))
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield train_x[rows], train_y[rows]


def train(model):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    curve = []
    for epoch in range(EPOCHS):
        model.train()
        for x, y in batches(epoch):
            step(model, optimizer, x, y)
        model.eval()
        curve.append(float(accuracy(model)))
    return curve


curves = {}
for name, make in MIDDLES.items():
    model = Net(make(nnx.Rngs(1)), nnx.Rngs(0))
    curves[name] = train(model)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model.middle, nnx.Param)))
    print(f"{name:16} {size:8,} parameters   {curves[name][-1]:.1%}")

# %% [markdown]
# ## Compared

# %%
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 16, "lines.linewidth": 3, "figure.constrained_layout.use": True})

plt.figure(figsize=(6, 5.5))
for name, curve in curves.items():
    plt.plot(range(1, EPOCHS + 1), [100 * a for a in curve], label=name)
plt.xlabel("epoch")
plt.ylabel("test accuracy, %")
plt.legend(loc="lower right", fontsize=14)
plt.show()

# %% [markdown]
# One run each, of one seed: one of the 360 test pictures is 0.3 %, so that differences of a
# percent say little. The SFNE block is also much the largest. What the figure does show: each of
# these layers trains inside a model that was not made for it.
#
# ## The same in Flax Linen
# `terminator_jax.layers.linen` has every layer by the same name, without `rngs`. Here all four
# follow one another in one model. The lambda layer has running statistics, which `apply` returns
# in training.

# %%
from flax import linen as nn

from terminator_jax.layers import linen


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = linen.InstanceStandardization()
        x = nn.gelu(norm(nn.Conv(CHANNELS, (3, 3))(x)))
        x = norm(linen.GlobalHyperZZW(SIZE, CHANNELS)(x, x))
        x = linen.LambdaLayer(CHANNELS, CHANNELS, size=SIZE)(x, use_running_average=not train)
        kernel = self.param("kernel", nn.initializers.normal(0.1), (15, 15, CHANNELS))
        x = nn.gelu(norm(fft_conv(x, kernel)))
        average = dict(use_running_average=not train)
        x = linen.SFNEBlock(SIZE, CHANNELS, 1, branches=BRANCHES, **average)(x)
        return nn.Dense(10)(x.mean((1, 2)))


net, optimizer = LinenNet(), optax.adam(3e-3)
variables = jax.jit(net.init)(jax.random.key(0), train_x[:1])
params, statistics = variables["params"], variables["batch_stats"]
moments = optimizer.init(params)


@jax.jit
def linen_step(params, statistics, moments, x, y):
    def loss(params):
        variables = {"params": params, "batch_stats": statistics}
        logits, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    gradients, statistics_now = jax.grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradients, moments)
    return optax.apply_updates(params, updates), statistics_now, moments


for epoch in range(EPOCHS):
    for x, y in batches(epoch):
        params, statistics, moments = linen_step(params, statistics, moments, x, y)
logits = jax.jit(net.apply)({"params": params, "batch_stats": statistics}, test_x)
print(f"all four in one Linen model: {jnp.mean(logits.argmax(-1) == test_y):.1%}")

# %% [markdown]
# ## What to try next
# - `operator="product"` or `"convolution"` for `GlobalHyperZZW`, and `omega0=2.0`.
# - `window=(5, 5)` in place of `size=SIZE` for the lambda layer, or
#   `layers.LocalAttention2D(CHANNELS, window=2, heads=3, rngs=rngs)` in its place.
# - A slow network of your own: `layers.SlowFast`.
#   [docs/layers.md](https://github.com/OWNER/terminator-jax/blob/main/docs/layers.md) has an
#   example of every layer.
# - The notebook [kernels_and_context](kernels_and_context.ipynb): what each of these layers sees.
