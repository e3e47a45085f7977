"""Layers for full-context interaction in JAX: slow networks make kernels, fast networks use them.

Import the floor that you need; this module itself imports nothing, so that `import terminator_jax`
stays instant:

- `terminator_jax.layers`: Flax NNX modules, for your own models
- `terminator_jax.models`: whole networks with named variants
- `terminator_jax.ops`: the functions underneath, arrays in, arrays out
- `terminator_jax.optim`: the optimizers Kar2 and Kar3 as optax transformations
- `terminator_jax.losses`: label smoothing and the slow neural loss

`terminator_jax.load_model(workdir)` loads the trained model of a run.
`terminator_jax.calibrate(model, batches)` computes a model's running averages;
`terminator_jax.use_batch_statistics(model)` makes one do without.

`python -m terminator_jax.train --help` shows the training application (install the `train` extra).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from terminator_jax.layers.running import calibrate as calibrate
    from terminator_jax.layers.running import use_batch_statistics as use_batch_statistics
    from terminator_jax.loading import load_model as load_model

__version__ = "0.1.0"

# Where each function is; importing it imports JAX.
_FUNCTIONS = {
    "load_model": "terminator_jax.loading",
    "calibrate": "terminator_jax.layers.running",
    "use_batch_statistics": "terminator_jax.layers.running",
}


def __getattr__(name: str):
    """Imports a function when it is asked for."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})
