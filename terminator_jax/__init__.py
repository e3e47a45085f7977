"""Layers for full-context interaction in JAX: slow networks make kernels, fast networks use them.

Import the floor that you need; this module itself imports nothing, so that `import terminator_jax`
stays instant:

- `terminator_jax.layers`: Flax NNX modules, for your own models
- `terminator_jax.models`: whole networks with named variants
- `terminator_jax.ops`: the functions underneath, arrays in, arrays out
- `terminator_jax.optim`: the optimizers Kar2 and Kar3 as optax transformations
- `terminator_jax.losses`: label smoothing and the slow neural loss

`terminator_jax.load_model(workdir)` loads the trained model of a run, and
`terminator_jax.calibrate(model, batches)` gives one its running averages.

`python -m terminator_jax.train --help` shows the training application (install the `train` extra).
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Imports `load_model` or `calibrate` when it is asked for, and JAX with it."""
    if name == "load_model":
        from terminator_jax.loading import load_model

        return load_model
    if name == "calibrate":
        from terminator_jax.layers.running import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
