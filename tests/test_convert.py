"""Weights of the public release: names, errors, files, and the command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled

import terminator_jax
from terminator_jax import convert
from terminator_jax.layers import BRANCHES
from terminator_jax.models import Terminator, TerminatorConfig

# Shapes tell everything but the dropout, which the import sets to the release's.
CONFIG = TerminatorConfig(
    size=(4, 4), channels=2, num_classes=3, factors=(6, 1, 2), skips=((), (), (0,)),
    dropout=(0.0, 0.05, 0.05), branches=BRANCHES, groups=12, global_hidden=3,
    global_layers=(2, 1, 1), local_hidden=4, local_layers=1, channel_hidden=5, channel_layers=2,
    interaction_channel_hidden=6, interaction_spatial_hidden=7, interaction_layers=1,
)  # fmt: skip
AT = "blocks.1.fast_multi_branch."


@pytest.fixture(scope="module")
def model():
    return filled(lambda: Terminator(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def state_dict(model):
    return convert.terminator_to_release(model)


def test_a_release_has_no_running_averages(state_dict):
    """Evaluation says what to do, while it is traced."""
    model = convert.terminator_from_release(state_dict)
    model.eval()
    with pytest.raises(ValueError, match=r"terminator_jax\.calibrate\(model, batches\)"):
        jax.eval_shape(model, jnp.zeros((2, 4, 4, 2)))
    terminator_jax.use_batch_statistics(model)
    assert nnx.eval_shape(lambda m: m(jnp.zeros((2, 4, 4, 2))), model).shape == (2, 3)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def without_fast(name):
    """One published variant: `linear_k` for `fast_linear_k`, `fast_bias_p` for `bias_p`."""
    if "Fast_Kernel_rgu" in name:
        name = name.replace(".fast_linear_", ".linear_").replace(".bias_p", ".fast_bias_p")
    return name


def without_hi(name):
    return re.sub(r"(slow_net_g[cs])_hi\.", r"\1.", name)


VARIANTS = {
    "canonical": lambda name: name,
    "without fast_": without_fast,
    "without _hi": without_hi,
    "without both, by Lightning": lambda name: "network." + without_hi(without_fast(name)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_naming_is_the_canonical_one(state_dict, variant):
    renamed = {VARIANTS[variant](name): array for name, array in state_dict.items()}
    assert (renamed.keys() == state_dict.keys()) == (variant == "canonical")
    assert_same(convert.canonical(renamed), state_dict)


def test_round_trip_is_exact(state_dict):
    """In values, names, and the configuration that the shapes tell."""
    rename = VARIANTS["without both, by Lightning"]
    back = convert.terminator_from_release({rename(n): a for n, a in state_dict.items()})
    assert back.config == CONFIG
    assert_same(convert.terminator_to_release(back), state_dict)


def test_every_parameter_has_its_place(model, state_dict):
    """None is left out, none is there twice."""
    leaves = [variable.size for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert sum(array.size for array in state_dict.values()) == sum(leaves)
    entries = list(convert.release_entries(CONFIG))
    assert len(entries) == len(state_dict)
    marks = {name: np.full_like(array, n) for n, (name, array) in enumerate(state_dict.items())}
    marked = nnx.clone(model)
    convert.import_entries(marked, entries, marks)
    assert_same(convert.export_entries(marked, entries), marks)


def test_arrays_lie_in_memory_as_their_shapes_say(state_dict):
    """safetensors writes memory as it lies: a transposed view would be read back scrambled."""
    assert all(array.flags.c_contiguous for array in state_dict.values())


def test_two_dimensional_weights_are_transposed(model, state_dict):
    weight = state_dict[f"{AT}bottleneck_layer.weight"]
    assert weight.shape == (12, 120, 1, 1)
    np.testing.assert_array_equal(weight[:, :, 0, 0].T, model.blocks[1].bottleneck.kernel[...])
    gabor = state_dict[f"{AT}slow_net_l3.Kernel.filters.1.linear.weight"]
    np.testing.assert_array_equal(
        gabor[:, :, 0, 0].T, model.blocks[1].local.slow_nets.gabor_weight[2, 1]
    )


def test_dtypes_and_skips_may_be_chosen(state_dict):
    model = convert.terminator_from_release(
        state_dict, skips=((), (), (1,)), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16
    )
    dtypes = {v.dtype for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16
    assert model.config.skips == ((), (), (1,))


def changed(state_dict, name, change):
    """The state dict with one entry renamed, dropped or reshaped."""
    state_dict = dict(state_dict)
    array = state_dict.pop(name)
    if change == "misshapen":
        state_dict[name] = np.zeros((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
    elif change == "unknown":
        state_dict |= {name: array, f"{name}.more": array}
    elif change == "twice":
        state_dict |= {name: array, f"network.{name}": array}
    elif change == "empty":
        state_dict[name] = np.zeros(())
    return state_dict


# Of every kind one: weights, biases, positions, and what the configuration is read from.
NAMES = [
    "blocks.0.bias",
    f"{AT}bias3",
    f"{AT}Fast_Kernel_rgu_2.fast_linear_q.weight",
    f"{AT}Fast_Kernel_rgu.bias_p",
    f"{AT}slow_net_l4.Kernel.fast_linears_x.0.bias",
    f"{AT}slow_net_g.Kernel.output_linear.weight",
    f"{AT}local_interact_conv_2.channel_mixer.weight",
    "out_layer.weight",
]
READ_FIRST = [
    f"{AT}bottleneck_layer.weight",
    "blocks.0.fast_multi_branch.slow_net_g.Kernel.bias_p",
    "blocks.0.fast_multi_branch.slow_net_l1.Kernel.filters.0.linear.weight",
    "out_layer.bias",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["missing", "misshapen", "unknown", "twice"])
def test_wrong_entries_are_named(model, state_dict, name, change):
    wrong = changed(state_dict, name, change)
    message = f"{change} in the state dict: .*{re.escape(name)}"
    with pytest.raises(ValueError, match=message):
        convert.import_entries(model, convert.release_entries(CONFIG), convert.canonical(wrong))


@pytest.mark.parametrize("name", READ_FIRST)
@pytest.mark.parametrize(("change", "what"), [("missing", "missing"), ("empty", "misshapen")])
def test_wrong_entries_that_shape_the_configuration_are_named(state_dict, name, change, what):
    message = f"{what} in the state dict: .*{re.escape(name)}"
    with pytest.raises(ValueError, match=message):
        convert.terminator_from_release(changed(state_dict, name, change))


def test_a_state_dict_of_something_else():
    with pytest.raises(ValueError, match=r"missing in the state dict: blocks\.0\.fast_"):
        convert.terminator_from_release({"layer1.weight": np.zeros(3)})


def test_long_lists_are_cut(state_dict):
    more = {f"strange.{n}": np.zeros(1) for n in range(9)}
    with pytest.raises(ValueError, match=r"strange\.4 and 4 more$"):
        convert.terminator_from_release({**state_dict, **more})


def command(*arguments):
    # Before 0.10.2 jaxlib writes on stderr when it loads a program from the cache of the tests.
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "terminator_jax.convert", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent, timeout=120,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )  # fmt: skip


def run_main(capsys, *arguments):
    """The command without the second that a process takes to import JAX."""
    code = convert.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_round_trip(tmp_path, capsys, state_dict, suffix):
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    convert.write(source, {f"network.{without_hi(n)}": a for n, a in state_dict.items()})
    code, out, err = run_main(capsys, source, target)
    assert (code, err) == (0, "")
    assert out == f"wrote {target}: {CONFIG}\n"
    assert_same(convert.read(target), state_dict)
    assert {a.dtype for a in convert.read(target).values()} == {np.dtype("float32")}
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_checkpoints_of_pytorch(tmp_path, state_dict):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    nested = {"state_dict": {f"network.{n}": t for n, t in tensors.items()}, "epoch": 3}
    for name, content in (("plain.pth", tensors), ("lightning.ckpt", nested)):
        torch.save(content, tmp_path / name)
        found = convert.canonical(convert.read(tmp_path / name))
        assert_same(found, state_dict)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        convert.read(tmp_path / "list.pt")


class FakeTensor:
    """What the import asks of a tensor, for a test without PyTorch."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def double(self):
        return FakeTensor(self.array.astype(np.float64))

    def numpy(self):
        return self.array


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_become_arrays(state_dict, nested):
    tensors = {name: FakeTensor(array) for name, array in state_dict.items()}
    content = {"state_dict": tensors, "epoch": 3} if nested else tensors
    assert_same(convert.tensors_of(content, FakeTensor), state_dict)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": None}, {"model": {}}])
def test_no_state_dict(content):
    with pytest.raises(ValueError, match="holds no state dict"):
        convert.tensors_of(content, FakeTensor)


def test_the_command(tmp_path, state_dict):
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    convert.write(source, state_dict)
    done = command(source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(convert.read(target), state_dict)


def test_the_command_without_arguments():
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert "python -m terminator_jax.convert IN.{ckpt,pth,safetensors,npz} OUT" in done.stderr


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none.npz", "out.npz", "No such file"),
        ("none.safetensors", "out.npz", "No such file"),
        ("broken.npz", "out.npz", "cannot be read as an .npz of arrays: File is not a zip file"),
        ("broken.safetensors", "out.npz", "broken.safetensors"),
        ("array.npz", "out.npz", "array.npz"),
        ("empty.npz", "out.npz", "missing in the state dict"),
        ("wrong.npz", "out.npz", f"misshapen in the state dict: {AT}bias3 (2,), expected (1,)"),
        ("in.npz", "out.pth", "out.pth: expected .npz or .safetensors"),
        ("in.txt", "out.npz", "in.txt: expected .ckpt, .pth"),
        ("in.npz", "nowhere/out.npz", "nowhere"),
        ("in.npz", "folder.npz", "folder.npz"),
    ],
)
def test_errors_are_one_line_and_leave_no_output(
    tmp_path, capsys, state_dict, source, target, message
):
    make_source(tmp_path / source, state_dict)
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_main(capsys, tmp_path / source, tmp_path / target)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def make_source(path, state_dict):
    match path.stem:
        case "in":
            convert.write(path, state_dict) if path.suffix == ".npz" else path.write_text("text")
        case "wrong":
            convert.write(path, changed(state_dict, f"{AT}bias3", "misshapen"))
        case "empty":
            convert.write(path, {})
        case "broken":
            path.write_bytes(b"not an archive")
        case "array":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "in.ckpt").write_bytes(b"")
    code, _, err = run_main(capsys, tmp_path / "in.ckpt", tmp_path / "out.npz")
    assert (code, err) == (2, "error: .ckpt files need torch: pip install torch\n")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, state_dict):
    """Nothing but the old file is there afterwards."""
    target = tmp_path / "out.npz"
    target.write_text("old")

    def half(file, **arrays):
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        convert.write(target, state_dict)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
