"""Imports and exports weights of the public PyTorch release.

    python -m terminator_jax.convert IN.{ckpt,pth,safetensors,npz} OUT.{npz,safetensors}

reads a state dict in the naming of either published variant, with or without Lightning's prefix. It
checks that a model can be made from it, and writes it in the canonical naming as float32 arrays,
for `terminator_from_release`.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax import npz
from terminator_jax.atomic import replacing
from terminator_jax.errors import one_line
from terminator_jax.layers import running
from terminator_jax.layers.local import LocalBranch
from terminator_jax.layers.sfne import BRANCHES
from terminator_jax.models import Terminator, TerminatorConfig

# The other published variant's names, and Lightning's prefix: (pattern, canonical replacement).
VARIANTS = (
    (re.compile(r"^network\."), ""),
    (re.compile(r"(\.Fast_Kernel_rgu(?:_2)?\.)(linear_[kvqy]\.)"), r"\1fast_\2"),
    (re.compile(r"(\.Fast_Kernel_rgu(?:_2)?\.)fast_bias_p$"), r"\1bias_p"),
    (re.compile(r"(\.hyper_interact\.slow_net_g[cs])\."), r"\1_hi."),
)


class Entry(NamedTuple):
    """Names one tensor of the release, and its place in the model.

    Attributes:
      name: name in the release.
      path: attributes and indices that lead to the `nnx.Param`.
      index: the slice of a parameter that stacks several tensors.
      trailing_ones: for a pointwise weight, which is `(in, out)` in the model and `(out, in, 1…)`
        in the release: the number of trailing axes of length 1. None for other tensors.
      shape: shape in the release of any other tensor; None if the slice has that shape.
    """

    name: str
    path: tuple[str | int, ...]
    index: Any = ...
    trailing_ones: int | None = None
    shape: tuple[int, ...] | None = None


def terminator_from_release(
    state_dict: Mapping[str, Any],
    *,
    skips: tuple[tuple[int, ...], ...] | None = None,
    **kwargs,
) -> Terminator:
    """Makes a Terminator with the weights of a state dict in the release's naming.

    Args:
      state_dict: names to arrays or CPU tensors, e.g. `torch.load(…)["state_dict"]`.
      skips: for each block, the earlier blocks that it reads. The shapes give only their number. By
        default the first skip of block i comes from block i-2, the second from block i-3.
      kwargs: further arguments of `Terminator`: `dtype`, `param_dtype`, `axis_name`.

    Returns:
      The model. Its configuration is derived from the shapes. The release keeps no running
      averages: for evaluation call `terminator_jax.calibrate(model, batches)`, or
      `terminator_jax.use_batch_statistics(model)` after `model.eval()`.

    Raises:
      ValueError: if entries are unknown, missing or misshapen; the message names them.

    Example:
      >>> one_block = dict(factors=(12,), skips=((),), dropout=(0.0,), global_layers=(2,))
      >>> config = TerminatorConfig.digits(**one_block)
      >>> state_dict = terminator_to_release(Terminator(config, rngs=nnx.Rngs(0)))
      >>> terminator_from_release(state_dict).config == config
      True
    """
    arrays = canonical(state_dict)
    config = config_from_release({name: a.shape for name, a in arrays.items()}, skips)
    # No initial values are computed: every parameter comes from the state dict.
    model = nnx.eval_shape(lambda: Terminator(config, rngs=nnx.Rngs(0), **kwargs))
    import_entries(model, release_entries(config), arrays)
    return model


def terminator_to_release(model: Terminator) -> dict[str, np.ndarray]:
    """Exports the model's weights in the release's naming and layout.

    Example:
      >>> one_block = dict(factors=(12,), skips=((),), dropout=(0.0,), global_layers=(2,))
      >>> model = Terminator(TerminatorConfig.digits(**one_block), rngs=nnx.Rngs(0))
      >>> terminator_to_release(model)["out_layer.weight"].shape
      (10, 12)
    """
    return export_entries(model, release_entries(model.config))


def canonical(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Renames a state dict's arrays to the canonical naming.

    Raises:
      ValueError: if two of its names mean the same tensor.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in state_dict.items():
        if canonical_name(name) in arrays:
            _raise_if_any("twice", [canonical_name(name)])
        arrays[canonical_name(name)] = np.asarray(value)
    return arrays


def canonical_name(name: str) -> str:
    """Renames a tensor of either published variant, and removes Lightning's prefix.

    Example:
      >>> canonical_name("network.blocks.0.fast_multi_branch.Fast_Kernel_rgu.linear_k.bias")
      'blocks.0.fast_multi_branch.Fast_Kernel_rgu.fast_linear_k.bias'
    """
    for pattern, replacement in VARIANTS:
        name = pattern.sub(replacement, name)
    return name


def config_from_release(
    shapes: Mapping[str, tuple[int, ...]], skips: tuple[tuple[int, ...], ...] | None = None
) -> TerminatorConfig:
    """Derives the configuration from the shapes of a state dict in canonical naming.

    Raises:
      ValueError: if an entry is missing or has too few axes; the message names it.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in shapes:
            _raise_if_any("missing", [name])
        if len(shapes[name]) < axes or 0 in shapes[name]:
            _raise_if_any("misshapen", [f"{name} {shapes[name]}"])
        return shapes[name]

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in shapes)
        number = 1 + max((int(m[1]) for m in found if m), default=-1)
        if number > len(shapes):  # the numbers begin at 0, and none is left out
            raise ValueError(f"{number} parts are numbered, of only {len(shapes)} tensors")
        return number

    number = max(1, count(r"blocks\.(\d+)\."))
    at = [f"blocks.{i}.fast_multi_branch." for i in range(number)]
    channels = [shape(f"{p}channel_mixer_mlp.weight", 2)[0] for p in at]
    bottlenecks = [shape(f"{p}bottleneck_layer.weight", 2) for p in at]
    sizes = [
        shape(f"{at[0]}slow_net_l{n}.Kernel.bias_pk", 3)[-1]
        for n in range(1, count(re.escape(at[0]) + r"slow_net_l(\d+)\."))
    ]
    if skips is None:
        counts = [b[1] // c - 6 - len(sizes) for b, c in zip(bottlenecks, channels, strict=True)]
        skips = tuple(tuple(i - 2 - n for n in range(k)) for i, k in enumerate(counts))

    def net(prefix: str) -> tuple[int, int]:
        hidden = shape(f"{prefix}.Kernel.filters.0.linear.weight", 2)[0]
        return hidden, count(re.escape(prefix) + r"\.Kernel\.linears\.(\d+)\.")

    nets = dict(
        local=f"{at[0]}slow_net_l1",
        channel=f"{at[0]}channel_mixer_hci.slow_net_gc",
        interaction_channel=f"{at[0]}hyper_interact.slow_net_gc_hi",
        interaction_spatial=f"{at[0]}hyper_interact.slow_net_gs_hi",
    )
    widths = {f"{name}_hidden": net(prefix)[0] for name, prefix in nets.items()}
    return TerminatorConfig(
        size=shape(f"{at[0]}slow_net_g.Kernel.bias_p", 3)[2:],
        channels=channels[0],
        num_classes=shape("out_layer.bias", 1)[0],
        factors=tuple(b[0] // c for b, c in zip(bottlenecks, channels, strict=True)),
        skips=skips,
        dropout=(0.0, *(0.05,) * (number - 1)),
        branches=_branches(sizes),
        global_hidden=net(f"{at[0]}slow_net_g")[0],
        global_layers=tuple(net(f"{p}slow_net_g")[1] for p in at),
        local_layers=net(nets["local"])[1],
        channel_layers=net(nets["channel"])[1],
        interaction_layers=net(nets["interaction_spatial"])[1],
        **widths,
    )


def _branches(sizes: list[int]) -> tuple[LocalBranch, ...]:
    """Makes the release's local branches with other sizes."""
    if len(sizes) != len(BRANCHES):
        raise ValueError(f"the release has {len(BRANCHES)} local branches a block, got {sizes}")
    return tuple(
        LocalBranch(size, b.kernel_from, b.applied_to)
        for size, b in zip(sizes, BRANCHES, strict=True)
    )


def import_entries(
    model: nnx.Module, entries: Iterable[Entry], arrays: Mapping[str, np.ndarray]
) -> None:
    """Sets the model's parameters, which may be abstract, to the release's tensors.

    Raises:
      ValueError: if tensors are unknown, missing or misshapen; the message names them.
    """
    slots: dict[tuple, np.ndarray] = {}
    views = {}
    for entry in entries:
        param = _param(model, entry.path)
        slots.setdefault(entry.path, np.empty(param.shape, param.dtype))
        views[entry.name] = _release_view(slots[entry.path], entry)
    _raise_if_any("unknown", arrays.keys() - views.keys())
    _raise_if_any("missing", views.keys() - arrays.keys())
    wrong = (name for name, view in views.items() if arrays[name].shape != view.shape)
    _raise_if_any("misshapen", (f"{n} {arrays[n].shape}, expected {views[n].shape}" for n in wrong))
    for name, view in views.items():
        view[...] = arrays[name]
    for path, value in slots.items():
        _param(model, path).set_value(jnp.asarray(value))
    running.reset(model)  # a release has no running averages


def export_entries(model: nnx.Module, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Returns the model's parameters as the release's tensors: the inverse of `import_entries`."""
    return {
        entry.name: _release_view(np.asarray(_param(model, entry.path)[...]), entry).copy()
        for entry in entries
    }


def release_entries(config: TerminatorConfig) -> Iterator[Entry]:
    """Yields every tensor of the release for a configuration."""
    for i in range(len(config.factors)):
        yield from _block_entries(config, i)
    yield Entry("out_layer.weight", ("head", "kernel"), trailing_ones=0)
    yield Entry("out_layer.bias", ("head", "bias"))


def _block_entries(config: TerminatorConfig, i: int) -> Iterator[Entry]:
    size, at, block = config.size, f"blocks.{i}.fast_multi_branch.", ("blocks", i)
    d, channels = len(size), (config.block_channels[i],)
    yield Entry(f"blocks.{i}.bias", (*block, "bias"), shape=(1,))
    nets = (
        ("slow_net_g", ("slow_net",), size, config.global_layers[i]),
        ("channel_mixer_hci.slow_net_gc", ("channel_interaction", "channel"), channels,
         config.channel_layers),
        ("hyper_interact.slow_net_gc_hi", ("hyper_interaction", "channel"), channels,
         config.interaction_layers),
        ("hyper_interact.slow_net_gs_hi", ("hyper_interaction", "spatial"), size,
         config.interaction_layers),
    )  # fmt: skip
    for name, path, net_size, layers in nets:
        yield from slow_net_entries(f"{at}{name}.Kernel.", (*block, *path), net_size, layers)
    sizes, local = [b.size for b in config.branches], (*block, "local")
    for n in range(len(sizes)):
        name, net = f"{at}slow_net_l{n + 1}.Kernel.", (*local, "slow_nets")
        yield from local_net_entries(name, net, sizes, n, d, config.local_layers)
        mixer = f"{at}local_interact_conv_{n + 1}.channel_mixer."
        yield from linear_entries(mixer, local, d, ("mixer_weight", "mixer_bias"), n)
        yield Entry(f"{at}bias{n + 1}", (*local, "scalar"), n, shape=(1,))
    for name, path in (("channel_mixer_mlp", "mixer"), ("bottleneck_layer", "bottleneck")):
        yield from linear_entries(f"{at}{name}.", (*block, path), d)
    for name, path in (("Fast_Kernel_rgu", "rgu1"), ("Fast_Kernel_rgu_2", "rgu2")):
        yield from rgu_entries(f"{at}{name}.", (*block, path), size)


def linear_entries(
    name: str,
    path: tuple,
    trailing_ones: int,
    params: tuple[str, str] = ("kernel", "bias"),
    index=...,
) -> Iterator[Entry]:
    """Yields weight and bias of a pointwise layer; `params` are their names in the model."""
    yield Entry(f"{name}weight", (*path, params[0]), index, trailing_ones)
    yield Entry(f"{name}bias", (*path, params[1]), index)


def rgu_entries(name: str, path: tuple, size: tuple[int, ...]) -> Iterator[Entry]:
    """Yields the tensors of a recursive gated unit."""
    for part in "kvqy":
        yield from linear_entries(f"{name}fast_linear_{part}.", (*path, part), len(size))
    yield Entry(f"{name}bias_p", (*path, "position"), shape=(1, 1, *size))


def slow_net_entries(name: str, path: tuple, size: tuple[int, ...], layers: int) -> Iterator[Entry]:
    """Yields the tensors of a global, channel or spatial slow network for a kernel of `size`."""
    yield from _magnet_entries(name, path, len(size), layers)
    yield Entry(f"{name}bias_p", (*path, "position"), shape=(1, 1, *size))


def local_net_entries(
    name: str, path: tuple, sizes: Sequence[int], n: int, d: int, layers: int
) -> Iterator[Entry]:
    """Yields the tensors of the n-th local slow network over d axes, which the model stacks."""
    yield from _magnet_entries(name, path, d, layers, (n,))
    stop = sum(size**d for size in sizes[: n + 1])
    positions, shape = slice(stop - sizes[n] ** d, stop), (1, 1, *(sizes[n],) * d)
    yield Entry(f"{name}bias_pk", (*path, "position"), positions, shape=shape)
    for release, ours in (("fast_reduce", "reduce"), ("fast_fc1", "mix")):
        params = (f"{ours}_weight", f"{ours}_bias")
        yield from linear_entries(f"{name}{release}.", path, d, params, n)
    for layer in range(layers):
        linear, params = f"{name}fast_linears_x.{layer}.", ("context_weight", "context_bias")
        yield from linear_entries(linear, path, d, params, (n, layer))


def _magnet_entries(
    name: str, path: tuple, d: int, layers: int, index: tuple = ()
) -> Iterator[Entry]:
    gabor, square, out = ((f"{part}weight", f"{part}bias") for part in ("gabor_", "", "out_"))
    for layer in range(layers + 1):
        linear = f"{name}filters.{layer}.linear."
        yield from linear_entries(linear, path, d, gabor, (*index, layer))
    for layer in range(layers):
        yield from linear_entries(f"{name}linears.{layer}.", path, d, square, (*index, layer))
    yield from linear_entries(f"{name}output_linear.", path, d, out, index or ...)


def _param(model: nnx.Module, path: tuple) -> nnx.Param:
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


def _release_view(param: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns a view of the entry's part of a parameter, in the release's layout."""
    index = entry.index
    part = param[index if isinstance(index, slice | type(...)) else (*np.atleast_1d(index), ...)]
    if entry.trailing_ones is not None:
        return part.T.reshape(*part.T.shape, *(1,) * entry.trailing_ones)
    return part if entry.shape is None else part.reshape(entry.shape)


def _raise_if_any(problem: str, entries: Iterable[str]) -> None:
    """Raises ValueError with the problem and the first entries that have it, if any do."""
    entries = sorted(entries)
    if entries:
        more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        raise ValueError(f"{problem} in the state dict: {', '.join(entries[:5])}{more}")


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict from a file; PyTorch is imported only for its own formats.

    Raises:
      ValueError: for an unknown kind of file, or one without a state dict.
      ModuleNotFoundError: where the package that reads this kind is not installed.
    """
    match path.suffix:
        case ".npz":
            return npz.read(path)
        case ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        case ".ckpt" | ".pth" | ".pt":
            import torch

            loaded = torch.load(path, map_location="cpu", weights_only=True)
            return tensors_of(loaded, torch.Tensor)
    raise ValueError(f"cannot read {path}: expected .ckpt, .pth, .pt, .safetensors or .npz")


def tensors_of(loaded: Any, kind: type) -> dict[str, np.ndarray]:
    """Returns the arrays of a state dict, or of a checkpoint that holds one."""
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, kind) for t in tensors.values()):
        raise ValueError("holds no state dict: expected names and tensors")
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an `.npz` or `.safetensors` file, whole or not at all."""
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            # safetensors ignores strides, so the arrays must be contiguous.
            save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, partial)
        else:
            np.savez(partial, **arrays)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    if len(arguments) != 2:
        print(f"usage: {__doc__.split(chr(10) * 2)[1].strip()}", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        if target.suffix not in (".npz", ".safetensors"):
            raise ValueError(f"cannot write {target}: expected .npz or .safetensors")
        model = terminator_from_release(read(source))
        write(target, terminator_to_release(model))
    except ModuleNotFoundError as error:
        print(f"error: {source.suffix} files need {error.name}: pip install {error.name}",
              file=sys.stderr)  # fmt: skip
        return 2
    except Exception as error:  # whatever a broken file makes its reader raise
        print(f"error: {source}: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"wrote {target}: {model.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
