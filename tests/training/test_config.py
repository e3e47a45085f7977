"""Configurations: experiments, flags, JSON."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training import validation
from terminator_jax.training.optimizer import OPTIMIZERS
from terminator_jax.training.parallel import MODES
from terminator_jax.training.tasks import ImageClassification, make_task

EXPERIMENTS = sorted(Path("experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments(path):
    """Each is read, makes a task, survives JSON, and names its own command."""
    config = configs.read(path)
    task = make_task(config)
    assert configs.differences(configs.from_json(configs.to_json(config)), config) == {}
    # As an older version, which knew fewer fields, has kept it.
    kept = json.loads(configs.to_json(config))
    del kept["loss"]["channel_sum"], kept["compilation_cache"]
    assert configs.differences(configs.from_json(json.dumps(kept)), config) == {}
    text = path.read_text()
    assert f"python -m terminator_jax.train --config=experiments/{path.name}\n" in text
    assert "Reaches" in text and "take" in text.lower()
    if isinstance(task, ImageClassification):
        channels = task.model_config.channels
        assert len(config.data.mean) == len(config.data.std) == channels


def test_all_experiments_are_there():
    names = {path.stem for path in EXPERIMENTS}
    assert {"digits", "mnist", "cifar10", "cifar100", "stl10"} <= names
    assert {"text2d", "shakespeare2d"} <= names


def test_published_recipe():
    config = configs.read("experiments/cifar10.py")
    assert (config.batch_size, config.epochs) == (64, 100)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("kar3", 0.001215)
    assert (config.data.padding, config.data.padding_mode, config.data.flip) == (
        *(4, "symmetric"),
        True,
    )


@pytest.mark.parametrize("field", ["optimizer.name", "parallel"])
def test_names_that_pass_are_those_of_the_tables(field):
    accepts, wanted = validation.VALIDATORS[field]
    table = {"optimizer.name": OPTIMIZERS, "parallel": MODES}[field]
    assert all(accepts(name) for name in table)
    assert set(wanted.replace(" or ", ", ").split(", ")) == set(table)


def test_flags_change_fields_of_every_type():
    flags = ["epochs=7", "optimizer.learning_rate=1", "data.flip", "nodata.in_memory"]
    flags = [
        "--noconfig.data.in_memory" if f == "nodata.in_memory" else f"--config.{f}" for f in flags
    ]
    flags += ["--config.data.mean=(0.1, 0.2)", "--config.data.name", "mnist"]
    config = configs.override(configs.default_config(), flags)
    assert (config.epochs, config.optimizer.learning_rate, config.data.flip) == (7, 1.0, True)
    assert (config.data.in_memory, config.data.mean, config.data.name) == (
        False,
        (0.1, 0.2),
        "mnist",
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def get_config(): return 3", "must return a ConfigDict, not 3"),
        ("\nx = (", r"experiment\.py:2 fails: SyntaxError: "),
        ("x = 1", "fails: KeyError: 'get_config'"),
        (
            "import nonsense",
            r"experiment\.py:1 fails: ModuleNotFoundError: No module named 'nonsense'",
        ),
        (
            "\ndef get_config(): 1 / 0",
            r"experiment\.py:2 fails: ZeroDivisionError: division by zero",
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()",
            "config.[a-z_]+ is missing: start from default_config",
        ),
        (
            "from terminator_jax.training.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.epoch = 3\n    return c",
            r"experiment\.py:4 fails: AttributeError: .*epoch",
        ),
    ],
)
def test_files_that_fail(tmp_path, source, says):
    path = tmp_path / "experiment.py"
    path.write_text(source)
    with pytest.raises(InputError, match=says) as error:
        configs.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("data.grid", (4, 0), "must be two numbers greater than 0"),
        ("data.grid", (4.0, 5), "must be two numbers greater than 0"),
        ("data.hidden", 1.5, r"must be in \(0, 1\]"),
        ("data.mean", ("a",), "must be a tuple of numbers"),
        ("epochs", True, "must be of type int, not True"),
        ("data.std", (0.0,), "must be greater than 0"),
        ("optimizer.beta1", 1.0, r"must be in \[0, 1\)"),
        ("seed", -1, r"must be in \[0, 2\*\*32\)"),
        ("parallel", "tpu", "must be pmap or jit"),
    ],
)
def test_values_that_are_refused(field, value, says):
    config = configs.default_config()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=says):
        validation.check(config, configs.default_config())


def test_what_may_change_while_a_run_lasts():
    config = configs.default_config()
    config.log_every_steps, config.data.in_memory, config.seed = 1, False, 5
    assert configs.differences(configs.default_config(), config) == {"seed": "0 there, 5 now"}


SWEEP = ["--config.seed=1", "--config.data.mean=(0.1,)", "--config.model.options.num_classes=5"]


@pytest.mark.parametrize("refused", [[], ["--config.batch_size=-1"], ["--config.epoch=3"]])
def test_override_leaves_its_argument_as_it_was(refused):
    config = configs.default_config()
    with config.unlocked():
        config.model.options.branches = [[3, "x", "h"]]
    config.data.hidden_seed = config.get_ref("seed") * 2
    before = configs.to_json(config)
    with pytest.raises(InputError) if refused else contextlib.nullcontext():
        found = configs.override(config, [*SWEEP, *refused])
        assert (found.seed, found.data.hidden_seed, found.data.mean) == (1, 2, (0.1,))
        found.model.options.branches[0][0] = 5
        found.loss.l2 = 0.5
    assert configs.to_json(config) == before and config.is_locked


def test_read_leaves_the_configuration_of_a_file_as_it_was(tmp_path):
    """A file may return one that it, or another module, keeps."""
    path = tmp_path / "kept.py"
    path.write_text(
        "import sys\nfrom terminator_jax.training.config import default_config\n"
        "def get_config():\n    return sys.__dict__.setdefault('kept', default_config())\n"
    )
    try:
        assert configs.read(path, ["--config.seed=3"]).seed == 3
        assert configs.read(path).seed == 0
    finally:
        del sys.kept


def test_an_experiment_imports_its_neighbours(tmp_path):
    """Also two whose neighbours have the same name; nothing stays behind."""
    before, found = (sys.path.copy(), set(sys.modules)), []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "my_base.py").write_text(
            "from terminator_jax.training.config import default_config\n"
            f"def get_config():\n    c = default_config()\n    c.seed = {len(found)}\n"
            "    return c\n"
        )
        (folder / "mine.py").write_text(
            "def get_config(epochs='30'):\n    from my_base import get_config\n"
            "    c = get_config()\n    c.epochs = int(epochs)\n    return c\n"
        )
        found.append(configs.read(folder / "mine.py"))
    assert [config.seed for config in found] == [0, 1]
    assert configs.read(f"{tmp_path}/a/mine.py:7").epochs == 7
    assert (sys.path, "my_base" in sys.modules) == (before[0], False)
    with pytest.raises(InputError, match=r"mine\.py:4 fails: ValueError: invalid literal"):
        configs.read(f"{tmp_path}/a/mine.py:many")


def test_flags_of_a_file(run_main, tmp_path):
    file = tmp_path / "flags"
    file.write_text(f"# a comment\n--workdir={tmp_path / 'run'}\n--config.seed=-1\n")
    code, _, err = run_main("train", "--config=digits", f"--flagfile={file}")
    assert (code, err.count("\n")) == (2, 1) and "config.seed is -1" in err
    code, _, err = run_main("evaluate", f"--flagfile={file}")
    assert (code, err.count("\n")) == (2, 1) and f"{tmp_path / 'run'} holds no run" in err
    code, _, err = run_main("train", "--config=digits", f"--flagfile={tmp_path / 'no'}")
    assert (code, err.count("\n")) == (2, 1) and "Unable to open flagfile" in err
