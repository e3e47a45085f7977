"""The model of a run in one line of other people's code."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
from flax import nnx

import terminator_jax
from terminator_jax.data import sources
from terminator_jax.loading import save_model
from terminator_jax.training import config as configs
from terminator_jax.training import loop
from terminator_jax.training.evaluation import evaluate_checkpoint

pytestmark = pytest.mark.usefixtures("unoptimized")

CONFIGS = {name: f"tests/training/{name}.py" for name in ("small", "tiny")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of each kind, trained when it is first asked for."""
    trained = {}

    def run(name):
        if name not in trained:
            trained[name] = tmp_path_factory.mktemp(name)
            loop.train(configs.read(CONFIGS[name], ["--config.seed=3"]), trained[name])
        return trained[name]

    return run


@pytest.fixture
def digits():
    return sources.open_split("digits", "test").load()


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_it_gives_the_accuracy_of_the_evaluation(run, digits, name, capsys):
    """The small model has running averages, which belong to its variables."""
    loaded = terminator_jax.load_model(run(name))
    step, scores, *_ = evaluate_checkpoint(run(name))
    logits = loaded.logits(digits.image)
    hits = logits.argmax(-1) == digits.label
    np.testing.assert_allclose(loaded.baked().logits(digits.image), logits, atol=1e-5)
    assert (loaded.step, hits.mean()) == (step, pytest.approx(scores["accuracy"], abs=1e-6))
    assert loaded.config["model"]["variant"] in ("small", "digits")
    assert loaded.config["data"]["mean"] == (0.305,)
    assert loaded.classes == tuple("0123456789")
    assert loaded.shape == loaded.picture_shape == (8, 8, 1)
    assert isinstance(loaded.model, nnx.Module)


def test_texts_have_a_model_and_no_logits_of_images(tmp_path):
    loaded = terminator_jax.load_model(
        runs.write(tmp_path / "text", runs.tests_config("tiny_text"), classes=())
    )
    tokens = jnp.zeros((1, 4, 4), jnp.int32)
    assert loaded.model(tokens).shape == (1, 4, 4, 128) and loaded.shape is None
    with pytest.raises(ValueError, match="a nonlinear_transformer has no logits of images"):
        loaded.logits(np.zeros((1, 4, 4, 1), np.uint8))


def test_it_needs_no_data_pipeline(run, digits, tmp_path, run_python):
    """optax itself imports absl, so it comes first; from then on none of these can be imported."""
    np.savez(tmp_path / "digits.npz", image=digits.image, label=digits.label)
    expected = terminator_jax.load_model(run("tiny")).logits(digits.image)
    out = run_python(
        f"""
        import sys
        import flax.nnx, optax
        blocked = {{"absl", "etils", "grain", "ml_collections", "orbax", "tensorflow_datasets"}}
        for name in [*sys.modules, *blocked]:
            if name.split(".")[0] in blocked:
                sys.modules[name] = None
        import numpy as np
        import terminator_jax
        loaded = terminator_jax.load_model({str(run("tiny"))!r})
        images = np.load({str(tmp_path / "digits.npz")!r})["image"]
        np.save({str(tmp_path / "logits.npy")!r}, loaded.logits(images))
        """,
        optimize=False,
    )
    assert out == ""
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 80, 100])
def test_any_number_of_images(run, digits, count):
    loaded = terminator_jax.load_model(run("small"))
    logits = loaded.logits(digits.image[:count])
    assert logits.shape == (count, 10)
    np.testing.assert_allclose(logits, loaded.logits(digits.image)[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), TypeError, "images of uint8 or uint16, got float32"),
        (np.zeros((2, 8, 8), np.uint8), ValueError, "got (2, 8, 8)"),
        (np.zeros((2, 9, 8, 1), np.uint8), ValueError, "= (8, 8, 1), got (2, 9, 8, 1)"),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, "= (8, 8, 1), got (2, 8, 8, 3)"),
    ],
)
def test_images_that_do_not_fit(run, images, error, says):
    loaded = terminator_jax.load_model(run("small"))
    with pytest.raises(error) as raised:
        loaded.logits(images)
    assert says in str(raised.value)


def test_a_run_of_an_older_version_gets_its_file_by_an_evaluation(run, tmp_path, capsys):
    workdir = run("small")
    (workdir / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"terminator_jax\.evaluate` for a run of an older"):
        terminator_jax.load_model(workdir)
    evaluate_checkpoint(workdir)
    before, now = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path, workdir)
    )
    assert before.keys() == now.keys()
    assert all((before[name] == now[name]).all() for name in now)
    assert terminator_jax.load_model(tmp_path / "model.safetensors").step == 44


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04pickle", "cannot be read"),
        (safetensors.numpy.save({"a": np.ones(2)}), "holds no model of this package"),
    ],
)
def test_files_that_hold_no_model(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        terminator_jax.load_model(tmp_path)


def test_variables_of_another_shape(run, tmp_path):
    config = (run("small") / "config.json").read_text()
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    save_model(tmp_path / "model.safetensors", state, config=config, classes=(), step=1)
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        terminator_jax.load_model(tmp_path)


def test_a_model_of_float64(tmp_path):
    wide = runs.write(tmp_path / "wide", runs.tests_config("small", "dtype=float64"))
    with pytest.raises(ValueError, match=r"a model of float64, which needs JAX_ENABLE_X64=1"):
        terminator_jax.load_model(wide)


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    path = tmp_path / "model.safetensors"
    save_model(path, state, config=json.dumps({}), classes=("a",), step=1)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(path, state, config=json.dumps({}), classes=("b",), step=2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_no_model_of_ours_is_one_line(run, tmp_path):
    """Foreign metadata, sizes that only announce themselves, weights that are not finite."""
    good = safetensors.numpy.load_file(run("small") / "model.safetensors")
    with safetensors.safe_open(run("small") / "model.safetensors", "np") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])

    def refused(arrays, match, **changes):
        path = tmp_path / "model.safetensors"
        path.write_bytes(safetensors.numpy.save(arrays, {**metadata, **changes}))
        with pytest.raises(ValueError, match=match) as caught:
            terminator_jax.load_model(path)
        assert "\n" not in str(caught.value)

    for value in (np.nan, np.inf):
        broken = good | {"linear.bias": np.full_like(good["linear.bias"], value)}
        refused(broken, "is damaged: linear.bias is not of finite numbers")
    holds = "holds no model of this package: "
    for text in ("", "[]", "null", "{", "[" * 100_000, json.dumps({**config, "model": 3})):
        refused(good, holds, config=text)
    refused(good, holds, step="many")
    refused(good, holds, classes="7")
    for shape in ("[8, 8]", "[4, 16, 2]", "[7, 9, 1]", "[-8, -8, 1]", '"881"', "8", "[8, [8], 1]"):
        refused(good, holds, shape=shape)
    for options in ({"size": [10**9, 10**9]}, {"num_classes": 10**12}, {"size": "ab"}):
        model = {**config["model"], "options": options}
        refused(good, holds, config=json.dumps({**config, "model": model}))


def test_a_loaded_model_is_a_key_of_a_cache(tmp_path):
    loaded, calls = terminator_jax.load_model(runs.write_linear(tmp_path / "run")), []

    @functools.lru_cache
    def cached(model):
        calls.append(model)
        return len(calls)

    again = terminator_jax.load_model(tmp_path / "run")
    assert (cached(loaded), cached(loaded), cached(again)) == (1, 1, 2)
    assert loaded == loaded and loaded != again
