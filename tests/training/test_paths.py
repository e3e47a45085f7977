"""The three ways to name an experiment, and where a run goes that names no directory."""

import configparser
import json
from pathlib import Path

import pytest

from terminator_jax.errors import InputError
from terminator_jax.training import config as configs
from terminator_jax.training import loop, paths
from terminator_jax.training.evaluation import evaluate_checkpoint

REPOSITORY = Path(__file__).parents[2]
SMALL = Path(__file__).with_name("small.py")


@pytest.mark.parametrize("name", ["digits", "digits.py", "experiments/digits.py"])
def test_experiments_of_the_package_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.read(name).model.variant == "digits"


def test_a_file_comes_before_an_experiment_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(SMALL.read_text())
    assert configs.read("digits").model.variant == "small"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar11", "no configuration file or experiment 'cifar11': did you mean cifar10?"),
        ("other/digits.py", "no configuration file or experiment 'other/digits.py'"),
        ("digits.txt", "no configuration file or experiment 'digits.txt'"),
        ("xyz", "experiments are cifar10, cifar100, digits"),
        ("experiments", "no configuration file or experiment 'experiments'"),
    ],
)
def test_there_is_no_such_experiment(name, says):
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        paths.experiment_file(name)


def test_everything_is_installed():
    """The list of packages in setup.cfg is that of the tree; the experiments are one of them."""
    metadata = configparser.ConfigParser()
    metadata.read(REPOSITORY / "setup.cfg")
    listed = metadata["options"]["packages"].split()
    folders = {path.parent for path in (REPOSITORY / "terminator_jax").rglob("*.py")}
    there = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert sorted(listed) == sorted(there | {"terminator_jax.experiments"})


def test_a_run_goes_where_its_experiment_says(command, tmp_path, monkeypatch):
    """Train without --workdir, go on with it, and evaluate by either name."""
    monkeypatch.chdir(tmp_path)
    out, _ = command.run("train", f"--config={SMALL}")
    first, *_, last = out.splitlines()
    assert first == "checkpoints and logs go to runs/small (--workdir sets another directory)"
    assert last == "checkpoints: runs/small/checkpoints   logs: runs/small/log.jsonl"
    assert json.loads(Path("runs/small/config.json").read_text())["model"]["name"] == "small"
    out, _ = command.run("train", f"--config={SMALL}", "--workdir=runs/small")
    assert out.startswith("was done already: 44 steps")


@pytest.mark.parametrize("flag", ["--config=text2d", "--workdir=runs/text2d"])
@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_other_commands_look_there_too(run_main, module, flag):
    code, _, err = run_main(module, flag)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: runs/text2d holds no run: ")


@pytest.mark.parametrize("module", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "one of the arguments "),
        (["--config=digits", "--workdir=runs/digits"], "not allowed with argument"),
    ],
)
def test_a_run_has_one_name(run_main, module, flags, says):
    code, _, err = run_main(module, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


@pytest.mark.parametrize(
    ("workdir", "says"),
    [
        ("gs://bucket/run", "must be a directory of this machine"),
        ("s3://bucket/run", "must be a directory of this machine"),
        ("file:/tmp/run", "must be a directory of this machine"),
        ("runs[1]", "must not contain [ ]"),
        ("what?", "must not contain ?"),
        ("a*b/c", "must not contain *"),
        ("", "must be a directory's name"),
    ],
)
def test_workdirs_whose_checkpoints_could_not_be_read(
    run_main, tmp_path, monkeypatch, workdir, says
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main("train", f"--config={SMALL}", f"--workdir={workdir}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_above_counts_too(tmp_path, monkeypatch):
    (tmp_path / "[x]").mkdir()
    monkeypatch.chdir(tmp_path / "[x]")
    with pytest.raises(InputError, match="must not contain"):
        paths.local_directory("run")


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.local_directory("~/run") == tmp_path / "run"
    # What is nobody's home is a name like any other.
    assert paths.local_directory("~nobody-of-this-name") == Path("~nobody-of-this-name")


@pytest.mark.parametrize("workdir", ["sp ace/ü", "a{b}%20", "two\nlines", "x" * 200])
def test_checkpoints_in_odd_places_are_read_again(tmp_path, workdir, capsys):
    workdir = paths.local_directory(str(tmp_path / workdir))
    outcome = loop.train(configs.read(SMALL, ["--config.epochs=2"]), workdir)
    step, scores, *_ = evaluate_checkpoint(workdir)
    assert (step, scores["accuracy"]) == (outcome.best_step, outcome.best["accuracy"])
