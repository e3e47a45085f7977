# %% [markdown]
# # Kernels and context
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/terminator-jax/blob/main/notebooks/kernels_and_context.ipynb)
#
# Three questions about slow-fast layers, answered by pictures, without any training:
#
# 1. What does a slow network draw?
# 2. What does it draw at another resolution?
# 3. Which positions of the input does a position of the output see, and which do convolutions and
#    attention let it see?

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
# ## 1. What a slow network draws
# A slow network is a small network of sines. Its input is the coordinates of a position, from -1
# to 1 along each axis. Its output is the kernel's value there. The scale ω₀ of its frequencies
# decides how fine the kernels are that it starts from. These are kernels of 64×64 positions.

# %%
import matplotlib.pyplot as plt
from flax import nnx

from terminator_jax import layers

plt.rcParams.update({"font.size": 16, "figure.constrained_layout.use": True})
SIZE = (16, 16) if os.environ.get("NOTEBOOK_SIZE") == "tiny" else (64, 64)  # tiny: in the test


def draw(axis, kernel, title):
    limit = abs(kernel).max()
    axis.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
    axis.set_title(title)
    axis.axis("off")


figure, axes = plt.subplots(2, 2, figsize=(6, 6.4))
for axis, omega0 in zip(axes.flat, [0.2, 1, 5, 2000], strict=True):
    slow_net = layers.GlobalSlowNet(SIZE, 3, omega0=omega0, rngs=nnx.Rngs(0))
    draw(axis, slow_net()[..., 0], f"ω₀ = {omega0}")
plt.show()

# %% [markdown]
# Below ω₀ = 1 the kernels are smooth. At 2000, the published value, they are white noise:
# neighbours have nothing in common, and each position has a value of its own, as in a table of
# parameters.
#
# ## 2. Other resolutions
# A kernel is a function of coordinates, so that it can be asked for at more of them.
# `model.resized` makes the same network for another size. From 8×8 to 15×15, and from there to
# 29×29, every other position is one of those before.

# %%
from terminator_jax.models import Terminator, TerminatorConfig

two_blocks = dict(factors=(12, 2), skips=((), ()), dropout=(0.0, 0.0), global_layers=(2, 2))
figure, axes = plt.subplots(2, 3, figsize=(6, 4.8))
for row, omega0 in zip(axes, [0.5, 2000], strict=True):
    config = TerminatorConfig(size=(8, 8), channels=1, omega0=omega0, **two_blocks)
    model = Terminator(config, rngs=nnx.Rngs(0))
    for axis, side in zip(row, [8, 15, 29], strict=True):
        resized, changes = model.resized((side, side))
        draw(axis, resized.blocks[1].slow_net()[..., 0], f"{side}×{side}")
    place = dict(rotation=90, va="center", ha="right", transform=row[0].transAxes)
    row[0].text(-0.1, 0.5, f"ω₀ = {omega0}", **place)
plt.show()
print("changed, among others:", *changes[:2], sep="\n- ")

# %% [markdown]
# Where kernels are smooth, a finer grid shows the same kernel in more detail. At 2000 the
# positions in between are new noise, which a trained network has never met. For other resolutions,
# train with a small ω₀.
#
# ## 3. What a position sees
# The gradient of one position of the output by the whole input says which positions had a part in
# it, and how large. The maps are random, of 15×15 positions and 12 channels, and the layers are as
# they are initialized. The dot marks the position asked about.

# %%
import jax.numpy as jnp

MAP, CHANNELS, POSITION = (15, 15), 12, (4, 9)
rngs = nnx.Rngs(0)


class HyperZZW(nnx.Module):
    def __init__(self, operator):
        self.layer = layers.GlobalHyperZZW(MAP, CHANNELS, operator=operator, rngs=rngs)

    def __call__(self, x):
        return self.layer(x, x)


def conv():
    return nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)


LAYERS = {
    "one 3×3": conv(),
    "four 3×3": nnx.Sequential(conv(), nnx.gelu, conv(), nnx.gelu, conv(), nnx.gelu, conv()),
    "attention 5×5": layers.LocalAttention2D(CHANNELS, window=2, heads=3, rngs=rngs),
    "attention": layers.LocalAttention2D(CHANNELS, window=None, heads=3, rngs=rngs),
    "lambda layer": layers.LambdaLayer(CHANNELS, CHANNELS, size=MAP, rngs=rngs),
    "HyperZZW dot": HyperZZW("dot"),
    "dot, twice": nnx.Sequential(HyperZZW("dot"), HyperZZW("dot")),
    "HyperZZW conv.": HyperZZW("convolution"),
    "SFNE block": layers.SFNEBlock(MAP, CHANNELS, factor=1, rngs=rngs),
}
x = jax.random.normal(jax.random.key(1), (1, *MAP, CHANNELS))


def seen(layer):
    """Size of the gradient of one position, over all channels, as a part of the largest: `MAP`."""
    terminator_jax.calibrate(layer, [x])  # running averages, and evaluation mode
    gradient = jax.jit(jax.jacrev(lambda x: layer(x)[0, *POSITION]))(x)
    size = jnp.sqrt(jnp.sum(gradient**2, axis=(0, 1, -1)))
    return size / size.max()


figure, axes = plt.subplots(3, 3, figsize=(6, 7.4))
for axis, (name, layer) in zip(axes.flat, LAYERS.items(), strict=True):
    share = seen(layer)
    image = axis.imshow(jnp.log10(share + 1e-9), vmin=-4, vmax=0)
    axis.plot(*POSITION[::-1], "o", color="red", markersize=5)
    axis.set_title(name, fontsize=15)
    axis.axis("off")
    print(
        f"{name:14} sees {jnp.mean(share > 1e-4):4.0%} of the positions, "
        f"{jnp.mean(share > 1e-2):4.0%} well"
    )
bar = figure.colorbar(image, ax=axes, location="bottom", aspect=30, ticks=[-4, -2, 0])
bar.ax.set_xticklabels(["1/10,000", "1/100", "1"])
plt.show()

# %% [markdown]
# A position is seen if its gradient is at least 1/10,000 of the largest, and well from 1/100 on.
#
# - **Convolutions** see a square that grows by one position to each side with each of them.
# - **Attention** could see everything within its window, but a softmax chooses. In this library
#   each head begins by looking at one neighbour, and the turns of the position embedding repeat
#   that.
# - The **lambda layer** sees everything from the start.
# - **HyperZZW** with the operator `dot`, a matrix product of maps, sees its row and its column,
#   and two of them see everything. With `convolution` one is enough, as far as the kernel reaches.
# - An **SFNE block** has all of these at once: the cross of `dot`, the squares of its local
#   kernels, of up to 9×9 positions, and everything else by means and standardization.
#
# ## What to try next
# - Another `POSITION`, such as a corner, and another `operator="product"`.
# - Layers that you trained, in place of these: after the notebook [train](train.ipynb),
#   `terminator_jax.load_model("runs/notebook-digits").model.blocks[1]` is an SFNE block.
# - A slow network of your own, by `layers.SlowFast`: see
#   [docs/layers.md](https://github.com/OWNER/terminator-jax/blob/main/docs/layers.md).
