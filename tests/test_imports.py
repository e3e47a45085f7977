"""The library floors stand without what only training needs, and imports only point down."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
from flax import nnx

PACKAGE = Path(__file__).parent.parent / "terminator_jax"

# From the ground up. A floor imports itself and floors below; commands stand on top of all.
FLOORS = [
    "errors",
    "atomic",
    "npz",
    "classes",
    "ops",
    "layers",
    "models",
    "losses",
    "optim",
    "renamed",
    "loading",
    "convert",
]
FLOORS += ["data", "training"]
# What else the library floors may import, besides the standard library.
THIRD_PARTY = {
    "errors": set(),
    "atomic": set(),
    "npz": {"numpy"},
    "classes": {"numpy"},
    "ops": {"jax", "numpy"},
    "layers": {"flax", "jax", "numpy"},
    "models": {"flax", "jax", "numpy"},
    "losses": {"flax", "jax", "numpy"},
    "optim": {"jax", "numpy", "optax"},
    "renamed": {"flax"},
    "loading": {"flax", "jax", "numpy", "safetensors"},
}
ONLY_FOR_TRAINING = [
    *("absl", "array_record", "etils", "grain", "matplotlib", "ml_collections", "orbax"),
    *("sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "torch", "tqdm"),
]
STANDARD = set(sys.stdlib_module_names)


def files(floor):
    return (
        [PACKAGE / f"{floor}.py"]
        if (PACKAGE / f"{floor}.py").is_file()
        else sorted((PACKAGE / floor).rglob("*.py"))
    )


def imported(source, module):
    """The absolute names that a module imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def wrong_imports(floor, names):
    below = {f"terminator_jax.{name}" for name in FLOORS[: FLOORS.index(floor) + 1]}
    for name in names:
        top, *rest = name.split(".")
        if top == "terminator_jax" and rest:
            ok = f"terminator_jax.{rest[0]}" in below
        else:
            ok = floor not in THIRD_PARTY or top in STANDARD | THIRD_PARTY[floor]
        if not ok:
            yield name


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    names = {path: imported(path.read_text(), name_of(path)) for path in files(floor)}
    assert names, f"no files in {floor}"
    wrong = {str(path): list(wrong_imports(floor, found)) for path, found in names.items()}
    assert {path: found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("floor", "source", "wrong"),
    [
        ("ops", "import jax.numpy as jnp, math", []),
        ("ops", "from flax import nnx", ["flax.nnx"]),
        ("ops", "from terminator_jax.layers import sfne", ["terminator_jax.layers.sfne"]),
        ("ops", "from ..layers import sfne", ["terminator_jax.layers.sfne"]),
        ("ops", "from . import pooling", []),
        ("layers", "from terminator_jax import ops", []),
        ("layers", "def f():\n    import orbax.checkpoint", ["orbax.checkpoint"]),
        ("data", "import grain\nfrom terminator_jax import training", ["terminator_jax.training"]),
    ],
)
def test_wrong_imports_are_found(floor, source, wrong):
    found = imported(source, f"terminator_jax.{floor}.module")
    assert list(wrong_imports(floor, found)) == wrong


def test_library_floors_without_what_training_needs(run_python):
    """optax itself imports absl, so it comes first; from then on none of these can be imported."""
    floors = [floor for floor in FLOORS if floor in THIRD_PARTY]
    run_python(
        f"""
        import importlib, sys
        blocked = {ONLY_FOR_TRAINING}
        sys.modules.update(dict.fromkeys(set(blocked) - {{"absl", "etils"}}))
        import flax.nnx, optax
        for name in list(sys.modules):
            if name.split(".")[0] in blocked:
                sys.modules[name] = None
        for floor in {floors}:
            importlib.import_module(f"terminator_jax.{{floor}}")
        """
    )


@pytest.mark.parametrize("floor", ["ops", "layers", "models", "optim"])
def test_exports(floor):
    """All there, and named in the module's table of contents if it has one."""
    module = importlib.import_module(f"terminator_jax.{floor}")
    assert all(hasattr(module, name) for name in module.__all__)
    if "| what |" in module.__doc__:
        assert [name for name in module.__all__ if f"`{name}`" not in module.__doc__] == []


def is_called(module):
    return any("__call__" in vars(base) for base in module.__mro__)


def test_every_layer_is_exported():
    """But for running averages, which are parts of layers."""
    layers = importlib.import_module("terminator_jax.layers")
    for path in files("layers"):
        module = importlib.import_module(name_of(path).removesuffix(".__init__"))
        public = {name: found for name, found in vars(module).items() if name[0] != "_"}
        for name, found in public.items():
            if getattr(found, "__module__", "").endswith(".running"):
                continue
            if inspect.isclass(found) and issubclass(found, nnx.Module) and is_called(found):
                assert getattr(layers, name) is found


def test_the_package_itself_is_light(run_python):
    out = run_python(
        """
        import sys, terminator_jax
        heavy = {"jax", "flax", "numpy", "optax"} & set(sys.modules)
        print(terminator_jax.__version__, sorted(heavy))
        """
    )
    assert out.split(maxsplit=1)[1] == "[]\n"


def test_training_starts_without_pytorch(run_python):
    """TensorBoard's writer imports it where it is installed, and so is imported late."""
    out = run_python(
        """
        import sys
        import terminator_jax.training.loop
        print(sorted({"tensorboardX", "tensorflow", "torch"} & set(sys.modules)))
        """
    )
    assert out == "[]\n"


def test_without_what_windows_lacks(run_python, tmp_path):
    """Everything is imported, and what needs no training works; `train` says what is missing."""
    run_python(
        f"""
        import importlib, os, signal, sys, warnings
        warnings.filterwarnings("ignore", "only soft file lock")  # of a package that JAX may use
        from pathlib import Path
        sys.modules["fcntl"] = None
        for name in ("SIGHUP", "SIGUSR1", "SIGKILL"):
            delattr(signal, name)
        del os.O_NOFOLLOW
        for path in Path("terminator_jax").rglob("*.py"):
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        import io, runs
        from terminator_jax import export, predict, train
        workdir = str(runs.write_linear(Path({str(tmp_path)!r}) / "linear"))
        np = runs.np
        np.save({str(tmp_path / "a.npy")!r}, runs.pictures()[0][:2])
        for module, code, arguments in (
            (predict, 0, [workdir, {str(tmp_path / "a.npy")!r}]),
            (export, 0, [workdir, {str(tmp_path / "a.zip")!r}]),
            (train, 1, ["--config=digits", {f"--workdir={tmp_path / 'run'}"!r}]),
        ):
            sys.argv[1:], sys.stderr = arguments, io.StringIO()
            try:
                module.cli.run(module.main, is_service=module is train)
            except SystemExit as ended:
                said = sys.stderr.getvalue()
                assert ended.code == code, said
        assert said.startswith("error: training needs the file locks") and said.count("\\n") == 1
        """
    )
    assert not (tmp_path / "run").exists()
