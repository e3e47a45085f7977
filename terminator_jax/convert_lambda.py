"""Weights of lambda layers as PyTorch's `lambda-networks` names them: import and export.

layer = lambda_layer_from_torch(torch_layer.state_dict())
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from terminator_jax.convert import Entry, export_entries, import_entries
from terminator_jax.layers import LambdaLayer

# Global contexts have an embedding of every relative position, local ones a 3-D convolution.
TABLE, CONVOLUTION = "rel_pos_emb", "pos_conv.weight"
# Counts the batches, which no computation here uses.
COUNTER = "num_batches_tracked"
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def lambda_layer_from_torch(state_dict: Mapping[str, Any], **kwargs) -> LambdaLayer:
    """Makes a lambda layer with the weights of a state dict.

    Args:
      state_dict: names to arrays or CPU tensors: of `to_q`, `to_k`, `to_v`, `norm_q` and `norm_v`,
        and `rel_pos_emb` (global contexts) or `pos_conv` (local ones).
      kwargs: further arguments of `LambdaLayer`: `method`, `use_running_average`, `dtype`,
        `param_dtype`, `axis_name`.

    Returns:
      The layer, its sizes worked out from the shapes.

    Raises:
      ValueError: naming the entries that are unknown, missing or misshapen.

    Example:
      >>> layer = LambdaLayer(6, 8, window=(3, 3), heads=2, keys=5, rngs=nnx.Rngs(0))
      >>> state_dict = lambda_layer_to_torch(layer)
      >>> state_dict["pos_conv.weight"].shape
      (5, 1, 1, 3, 3)
      >>> lambda_layer_from_torch(state_dict).heads
      2
    """
    arrays = {n: np.asarray(a) for n, a in state_dict.items() if not n.endswith(COUNTER)}
    if CONVOLUTION in arrays:
        arrays[CONVOLUTION] = _from_convolution(arrays[CONVOLUTION])
    inputs, outputs, sizes = _sizes({name: a.shape for name, a in arrays.items()})
    layer = nnx.eval_shape(
        lambda: LambdaLayer(inputs, outputs, **sizes, **kwargs, rngs=nnx.Rngs(0))
    )
    import_entries(layer, _entries(layer), arrays)
    return layer


def lambda_layer_to_torch(layer: LambdaLayer) -> dict[str, np.ndarray]:
    """Returns the layer's weights in the package's naming and layout; inverse of the import."""
    arrays = export_entries(layer, _entries(layer))
    if CONVOLUTION in arrays:
        arrays[CONVOLUTION] = np.moveaxis(arrays[CONVOLUTION], (-2, -1), (0, 1))[:, :, None]
    return arrays


def _from_convolution(weight: np.ndarray) -> np.ndarray:
    """Reshapes `(k, u, 1, *window)` to `(*window, k, u)`."""
    if weight.ndim < 4 or weight.shape[2] != 1:
        raise ValueError(
            f"misshapen in the state dict: {CONVOLUTION} {weight.shape},"
            " expected (k, u, 1, *window)"
        )
    return np.moveaxis(weight[:, :, 0], (0, 1), (-2, -1))


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, dict[str, Any]]:
    """Channels in and out, and what else shapes a `LambdaLayer`."""
    table = CONVOLUTION if CONVOLUTION in shapes else TABLE
    for name, axes in (("to_q.weight", 2), ("to_v.weight", 2), (table, 3)):
        if name not in shapes:
            raise ValueError(f"missing in the state dict: {name}")
        if len(shapes[name]) < axes or 0 in shapes[name]:
            raise ValueError(f"misshapen in the state dict: {name} {shapes[name]}")
    *reach, keys, depth = shapes[table]
    heads, values = shapes["to_q.weight"][0] // keys, shapes["to_v.weight"][0] // depth
    context = (
        dict(window=reach) if table == CONVOLUTION else dict(size=[(n + 1) // 2 for n in reach])
    )
    return (
        shapes["to_q.weight"][1],
        heads * values,
        dict(heads=heads, keys=keys, depth=depth, **context),
    )


def _entries(layer: LambdaLayer) -> Iterator[Entry]:
    """Returns every tensor of the package; that of a convolution in our layout."""
    for name in ("to_q", "to_k", "to_v"):
        yield Entry(f"{name}.weight", (name, "kernel"), trailing_ones=layer.table.ndim - 2)
    for name in ("norm_q", "norm_v"):
        for theirs, ours in NORM.items():
            yield Entry(f"{name}.{theirs}", (name, ours))
    if layer.bias is None:
        yield Entry(TABLE, ("table",))
    else:
        yield Entry(CONVOLUTION, ("table",))
        yield Entry("pos_conv.bias", ("bias",))
