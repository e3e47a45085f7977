"""What a user gets wrong: one line on stderr, exit code 2, nothing written."""

import jax
import pytest

from terminator_jax.layers import LocalBranch
from terminator_jax.training import config as configs
from terminator_jax.training.tasks import make_task

TINY = "tests/training/tiny.py"


def check(result, workdir, says):
    code, out, err = result
    assert (code, out) == (2, ""), out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert says in err
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("epoch=3", "there is no config.epoch: did you mean config.epochs?"),
        ("epochs=many", "config.epochs must be of type int, not 'many'"),
        ("epochs=²", "config.epochs must be of type int, not '²'"),
        ("optimizer.learning_rate=inf", "config.optimizer.learning_rate is inf, and must be fini"),
        ("loss.l2=nan", "config.loss.l2 is nan, and must be finite"),
        ("data.mean=(1e999,)", "config.data.mean is (inf,), and must be finite"),
        ("on_nonfinite=ignore", "config.on_nonfinite is 'ignore', and must be stop or skip"),
        ("batch_size=0", "config.batch_size is 0, and must be greater than 0"),
        ("batch_size=2000", "digits train has 1437 pictures, and config.batch_size, 2000"),
        ("optimizer.name=kar4", "config.optimizer.name is 'kar4', and must be kar3, kar2, sgd or"),
        ("optimizer.warmup_epochs=2.0", "must be less than config.epochs, 2"),
        ("model.name=transformer", "config.model.name is 'transformer', and must be one of"),
        ("model.variant=mnst", "config.model.variant is 'mnst', and must be one of cifar, mnist"),
        ("model.variant=mnist", "digits train has pictures of (8, 8) pixels, and the model is for"),
        (
            "data.resize=9",
            "digits train has pictures of (9, 9) pixels, and the model is for (8, 8)",
        ),
        (
            "data.mean=(0.1,0.2,0.3)",
            "config.data.mean has 3 values, and digits train has 1 channels",
        ),
        ("data.train_split=valid", "digits has no split 'valid': it has train, test"),
        ("data.name=mnits", "there is no data set 'mnits'"),
        ("best_metric=loss2", "config.best_metric is 'loss2', and must be one of accuracy, loss"),
        ("dtype=float64", "config.dtype is 'float64', which needs JAX_ENABLE_X64=1"),
    ],
)
def test_fields(run_main, tmp_path, field, says):
    workdir = tmp_path / "run"
    check(
        run_main("train", f"--config={TINY}", f"--workdir={workdir}", f"--config.{field}"),
        workdir,
        says,
    )


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("channels=3", "digits train has pictures of 1 channels, and the model is for 3"),
        ("num_classes=5", "digits train has 10 classes, and the model is for 5"),
        ("groups=5", "config.model.options: 1 x 12 channels do not divide into 5 groups"),
        ("depth=5", "there is no config.model.options.depth"),
        ("num_clases=5", "no config.model.options.num_clases: did you mean num_classes?"),
        ("num_classes", "has no value: write --config.model.options.num_classes=VALUE"),
        ("num_classes=five", "config.model.options.num_classes must be of type int, not 'five'"),
        ("num_classes=0", "num_classes is 0, and must be greater than 0"),
        ("skips=((),())", "config.model.options: skips must have one entry per block"),
        ("size=(8,16)", "the operator 'dot' needs square 2-D maps, got size (8, 16)"),
        ("size=(8,)", "the operator 'dot' needs square 2-D maps, got size (8,)"),
        ("operator=dott", "operator 'dott' is not one of ('dot', 'product', 'convolution')"),
        ("causal=True", "only sequences, of size (length,), are causal, not maps (8, 8)"),
        ("dropout=(1.5,)", "dropout is (1.5,), and must be numbers in [0, 1)"),
        ("factors=(twelve,)", "factors is ('(twelve,)',), and must be of type tuple[int, ...]"),
        ("branches=((4,'x','h'),)", "local branches with an odd size and the maps x, h or u"),
        ("branches=((3,'x','y'),)", "local branches with an odd size and the maps x, h or u"),
        ("omega0=inf", "omega0 is inf, and must be of type float"),
    ],
)
def test_options(run_main, tmp_path, option, says):
    workdir = tmp_path / "run"
    flags = [f"--config={TINY}", f"--workdir={workdir}", f"--config.model.options.{option}"]
    check(run_main("train", *flags), workdir, says)


def test_options_that_the_experiment_does_not_mention(tmp_path):
    flags = ["num_classes=5", "factors=(12, 3)", "skips=((),())", "dropout=(0,0.5)"]
    flags += ["global_layers=(2,2)", "operator=product", "branches=((3,'x','u'),)"]
    config = configs.read("digits", [f"--config.model.options.{flag}" for flag in flags])
    shape = make_task(config).model_config
    assert (shape.num_classes, shape.factors, shape.dropout) == (5, (12, 3), (0, 0.5))
    assert (shape.operator, shape.branches) == ("product", (LocalBranch(3, "x", "u"),))
    assert configs.from_json(configs.to_json(config)) == config


def test_options_of_an_experiment_file(run_main, tmp_path):
    """What a file sets is checked like what a flag sets."""
    workdir, config = tmp_path / "run", tmp_path / "experiment.py"
    config.write_text(
        "import runpy\n"
        "def get_config():\n"
        f"    config = runpy.run_path({TINY!r})['get_config']()\n"
        "    config.model.options = dict(config.model.options, depth=5)\n"
        "    return config\n"
    )
    says = "config.model.options: TerminatorConfig.__init__() got an unexpected keyword argument"
    check(run_main("train", f"--config={config}", f"--workdir={workdir}"), workdir, says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=nowhere.py"], "there is no configuration file or experiment 'nowhere.py'"),
        ([f"--config={TINY}", "--epochs=3"], "unknown flag '--epochs=3'"),
        ([f"--config={TINY}", "more"], "unexpected argument 'more'"),
        ([f"--config={TINY}", "--num_processes=two"], "argument --num_processes: invalid int"),
    ],
)
def test_flags(run_main, tmp_path, flags, says):
    workdir = tmp_path / "run"
    check(run_main("train", *flags, f"--workdir={workdir}"), workdir, says)


def test_workdir_is_a_file(run_main, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run_main("train", f"--config={TINY}", f"--workdir={file}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--workdir={file} cannot be written" in err


def test_data_set_is_not_prepared(run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    flags = ["--config=experiments/mnist.py", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.data.data_dir={tmp_path / 'data'}", "--config.data.download=False"]
    result = run_main("train", *flags)
    check(result, tmp_path / "run", f"mnist is not prepared in {tmp_path / 'data'}")
    assert "--config.data.download=True" in result[2] and "copy a prepared" in result[2]


def test_no_network(run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    flags = ["--config=experiments/mnist.py", f"--workdir={tmp_path / 'run'}"]
    result = run_main("train", *flags, f"--config.data.data_dir={tmp_path / 'data'}")
    check(result, tmp_path / "run", "mnist cannot be downloaded: storage.googleapis.com does not")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_batches_that_do_not_divide(run_main, tmp_path, field, monkeypatch):
    devices = 8 * jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: devices)
    flags = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.{field}=60"]
    says = f"config.{field} is 60, and must be a multiple of the number of devices, 8"
    check(run_main("train", *flags), tmp_path / "run", says)


def test_a_loss_that_is_not_finite(run_main, tmp_path):
    fields = ["optimizer.name=sgd", "optimizer.learning_rate=1e38", "log_every_steps=1"]
    flags = ["--config=tests/training/small.py", f"--workdir={tmp_path}"]
    code, _, err = run_main("train", *flags, *(f"--config.{field}" for field in fields))
    assert code == 2 and err.startswith("error: the loss of step ") and err.count("\n") == 1
    assert "lower config.optimizer.learning_rate; there is no checkpoint yet" in err


def test_help_needs_no_jax(run_python):
    out = run_python(
        """
        import sys
        sys.modules["jax"] = None
        from terminator_jax import evaluate, generate, train
        for command in (evaluate, generate, train):
            try:
                command.main(["--help"])
            except SystemExit as ended:
                assert not ended.code
        """
    )
    assert out.count("usage: ") == 3
