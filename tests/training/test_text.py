"""Training on hidden tokens, its evaluation and baselines, and texts from its checkpoints."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from terminator_jax.data import ngrams, text
from terminator_jax.training import config as configs
from terminator_jax.training import generation
from terminator_jax.training.tasks import make_task

TINY = "tests/training/tiny_text.py"
GRID = (6, 10)


class Stub:
    """A model whose logits are given, and which keeps what it was called with."""

    def __init__(self, logits):
        self.logits, self.config = logits, make_task(configs.read(TINY)).model_config

    def __call__(self, tokens):
        self.tokens = tokens
        return self.logits


def batch(count=6, masked=0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, 128, (count, *GRID), np.uint8)),
        "index": jnp.arange(10, 10 + count, dtype=jnp.int32),
        "mask": jnp.arange(count) < count - masked,
    }


def values(logits, tokens):
    """Cross-entropy and hits of every position."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.take_along_axis(log_p, np.asarray(tokens, int)[..., None], -1)[..., 0]
    return -right, logits.argmax(-1) == np.asarray(tokens)


def logits_for(data):
    """Random ones in which the right token is often the largest."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(*data["tokens"].shape, 128))
    right = 6 * rng.random(data["tokens"].shape)[..., None]
    return jnp.asarray(logits + right * np.eye(128)[np.asarray(data["tokens"])], jnp.float32)


def test_the_loss_is_that_of_hidden_tokens_sample_by_sample():
    task, data = make_task(configs.read(TINY)), batch()
    model = Stub(logits_for(data))
    loss, metrics = task.loss(model, data, nnx.Rngs(dropout=3))
    hidden = np.asarray(model.tokens == 128)
    assert (np.asarray(model.tokens)[~hidden] == np.asarray(data["tokens"])[~hidden]).all()
    entropy, hits = values(model.logits, data["tokens"])
    expected = [np.mean([x[n][hidden[n]].mean() for n in range(6)]) for x in (entropy, hits)]
    np.testing.assert_allclose([metrics["loss"], metrics["accuracy"]], expected, rtol=1e-5)
    assert loss == metrics["loss"] and 0.1 < expected[1] < 0.9


def test_what_training_hides():
    """Another share in every sample, from nearly none to nearly all, small ones more often."""
    task = make_task(configs.read(TINY))
    hide = jax.jit(lambda key: task.train_mask(key, (4000, 20, 20)))
    hidden = np.asarray(hide(jax.random.key(0)))
    shares = np.sort(hidden.mean((1, 2)))
    expected = np.square((np.arange(4000) + 0.5) / 4000)
    assert np.abs(shares - expected).max() < 0.04
    assert (hidden.sum((1, 2)) > 0).all()
    np.testing.assert_allclose(hidden.mean(0), 1 / 3, atol=0.04)
    assert (hidden != np.asarray(hide(jax.random.key(1)))).any()


def test_evaluation_hides_the_same_of_a_grid_in_every_batch():
    index = jnp.arange(40)
    task, other = (
        make_task(
            configs.read(TINY, ["--config.data.hidden=0.3", f"--config.data.hidden_seed={n}"])
        )
        for n in (0, 1)
    )
    whole = np.asarray(task.eval_mask(index, GRID))
    part = np.asarray(task.eval_mask(index[7:9], GRID))
    assert (part == whole[7:9]).all() and (whole[0] != whole[1]).any()
    assert abs(whole.mean() - 0.3) < 0.03
    assert (whole != other.eval_mask(index, GRID)).any()


def test_scores_leave_the_padding_out():
    task, data = make_task(configs.read(TINY, ["--config.data.hidden=0.25"])), batch(masked=2)
    model = Stub(logits_for(data))
    sums = task.eval_step(model, data)
    hidden = np.asarray(task.eval_mask(data["index"], GRID))
    assert (np.asarray(model.tokens == 128)[:4] == hidden[:4]).all()
    entropy, hits = values(model.logits, data["tokens"])
    assert sums["count"] == hidden[:4].sum()
    np.testing.assert_allclose(sums["loss"], entropy[:4][hidden[:4]].sum(), rtol=1e-5)
    assert sums["accuracy"] == hits[:4][hidden[:4]].sum() > 0


def test_baselines_are_of_the_bytes_that_evaluation_hides():
    task = make_task(configs.read(TINY))
    train, test = (text.open_text("sonnets", split, GRID) for split in ("train", "test"))
    found = task.baselines(test)
    counts = ngrams.count(train.data)
    hidden = task.eval_mask(jnp.arange(len(test)), GRID)
    single, pairs = [], []
    for place in np.flatnonzero(np.asarray(hidden).ravel()):
        before = test.data[place - 1] if place else ord("\n")
        single.append(-np.log(counts.unigram[test.data[place]]))
        pairs.append(-np.log(counts.bigram[before, test.data[place]]))
    assert found == pytest.approx({"unigram": np.mean(single), "bigram": np.mean(pairs)})
    assert found["bigram"] < found["unigram"] < np.log(128)


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """The directory of a finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("text")
    out, _ = command.train(workdir, "epochs=6", config=TINY)
    return workdir, out


def test_it_learns(trained):
    workdir, out = trained
    assert "sonnets train: 356 grids of text, 6 epochs of 22 steps" in out
    [unigram, bigram] = map(float, re.search(r"unigram (\S+)  bigram (\S+)", out).groups())
    assert bigram < unigram
    lines = list(map(json.loads, (workdir / "log.jsonl").read_text().splitlines()))
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert evaluations[-1]["loss"] < unigram + 0.05 < evaluations[0]["loss"]
    assert evaluations[-1]["count"] == evaluations[0]["count"]
    assert all("grids_per_second" in line for line in lines if line["kind"] == "train")


def test_evaluate(run_main, trained):
    """The best checkpoint is that of the smallest loss; the baselines stand beside it."""
    workdir, printed = trained
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    scores = {line["step"]: line for line in lines if line["kind"] == "eval"}
    best = min(scores, key=lambda step: scores[step]["loss"])
    _, out, _ = run_main("evaluate", f"--workdir={workdir}")
    loss, count = scores[best]["loss"], scores[best]["count"]
    assert out.startswith(f"step {best}: accuracy ")
    assert f"loss {loss:.4f}  {count:.0f} hidden bytes\n" in out
    baselines = re.search(r"unigram .*", printed)[0]
    assert out.endswith(f"loss without a model: {baselines}\n")
    _, out, _ = run_main("evaluate", f"--workdir={workdir}", "--config.data.hidden=0.1")
    assert int(re.search(r"(\d+) hidden bytes", out)[1]) < 0.3 * count


def test_the_card_of_a_text(trained):
    text = (trained[0] / "README.md").read_text()
    assert "hidden bytes of sonnets test; the best is by `loss`." in text
    assert "| training | sonnets train | 356 grids of text | 6 × 10 |" in text
    assert "| `model.options.layers` | `2` | `that of the variant` |" in text
    assert "classes:" not in text and "python -m terminator_jax.train --config=" in text


def test_eight_devices_hide_what_one_does(run_python):
    out = run_python(
        f"""
        import json
        import jax, numpy as np
        from nets import filled
        from terminator_jax.training import config as configs
        from terminator_jax.training.evaluation import make_evaluate
        from terminator_jax.training.setup import make_run
        from terminator_jax.training.state import new_state, split_model
        from terminator_jax.training.step import make_train_step

        def losses(parallel, devices):
            flags = ["dtype=float64", f"parallel={{parallel}}"]
            config = configs.read({TINY!r}, [f"--config.{{flag}}" for flag in flags])
            run = make_run(config, jax.devices()[:devices])
            step = run.parallel.compile(
                make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
            )
            _, params, model_state = split_model(filled(run.task.make_model, scale=0.2))
            state = run.parallel.replicate(new_state(params, model_state, run.tx, seed=0))
            found = []
            batches = run.train_batches()
            for _ in range(4):
                state, metrics = step(state, run.parallel.shard_batch(next(batches)))
                found.append(float(metrics["loss"]))
            run.state = state
            return [*found, make_evaluate(run)()["loss"]]

        print(json.dumps([losses(*way) for way in (("pmap", 1), ("pmap", 8), ("jit", 8))]))
        """,
        devices=8, x64=True, optimize=False,
    )  # fmt: skip
    one, pmap, jit = json.loads(out)
    assert len(set(one)) == 5
    np.testing.assert_allclose(pmap, one, rtol=1e-9)
    np.testing.assert_allclose(jit, one, rtol=1e-9)


def test_generate(run_main, trained):
    """Without the data: a round each, the prompt in its place, the same with the same seed."""
    workdir, _ = trained
    flags = [workdir, "--prompt=my love\n", "--at=2,6", "--rounds=3"]
    _, out, _ = run_main("generate", *flags)
    lines = out.splitlines()
    assert len(lines) == 3 * 7
    assert [lines[n] for n in (6, 13, 20)] == [
        "round 1: 45 hidden", "round 2: 26 hidden", "round 3: 0 hidden",
    ]  # fmt: skip
    for grid in (lines[:6], lines[7:13], lines[14:20]):
        assert all(len(row) == 10 for row in grid)
        assert grid[2][6:] + grid[3][:4] == "my love↵"
    assert "·" in lines[0] + lines[1] and "·" not in "".join(lines[14:20])
    assert run_main("generate", *flags)[1] == out
    _, other, _ = run_main("generate", *flags, "--seed=1", "--grid=4,20")
    assert [len(row) for row in other.splitlines()[:4]] == [20] * 4


def test_generate_on_a_terminal(run_main, trained, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, _ = run_main("generate", trained[0], "--rounds=2", "--temperature=0", "--top_k=3")
    begins, *rounds = out.split("\x1b[7A\x1b[J")
    assert code == 0
    assert begins == ("·" * 10 + "\n") * 6 + "begins\n"
    assert len(rounds) == 2 and rounds[1].endswith("round 2: 0 hidden\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rounds=0"], "--rounds is 0, and must be 1 or more"),
        (["--rounds=many"], "argument --rounds: invalid int value: 'many'"),
        (["--temperature=-1"], "--temperature is -1.0, and must be 0 or more"),
        (["--temperature=nan"], "--temperature is nan, and must be 0 or more"),
        (["--top_k=-1"], "--top_k is -1, and must be 0 or more"),
        (["--seed=-1"], "--seed is -1, and must be 0 or more"),
        (["--seed=4294967296"], "--seed is 4294967296, and must be less than 2**32"),
        (["--grid=4"], "--grid is '4', and must be two numbers from 1 on"),
        (["--grid=0,4"], "--grid is '0,4', and must be two numbers from 1 on"),
        (["--at=-1,2"], "--at is '-1,2', and must be two numbers from 0 on"),
        (["--at=6,0"], "--at is 6,0, and the grid has 6 rows and 10 columns"),
        (
            ["--prompt=love", "--at=5,7"],
            "the prompt has 4 bytes, and from --at=5,7 on the grid has 3",
        ),
        (["--prompt=love", "--grid=2,2"], "the prompt fills the whole grid"),
        (["--step=last"], "--step is 'last', and must be a step's number or best"),
        (["--step=7"], "holds no checkpoint of step 7: there are "),
        (["--steps=7"], "unrecognized arguments: --steps=7"),
    ],
)
def test_flags_of_generate(run_main, trained, flags, says):
    code, out, err = run_main("generate", trained[0], *flags)
    assert (code, out) == (2, ""), out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err, err


def test_generate_from_what_is_no_run_of_text(run_main, tmp_path):
    code, _, err = run_main("generate", tmp_path / "nowhere")
    assert code == 2 and "nowhere holds no run" in err
    (tmp_path / "config.json").write_text(configs.to_json(configs.default_config()))
    code, _, err = run_main("generate", tmp_path)
    assert (code, err.count("\n")) == (2, 1) and "holds a terminator, which is not for text" in err


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("data.grid=(6,)", "config.data.grid is (6,), and must be two numbers greater than 0"),
        ("data.grid=(200,200)", "which do not fill a grid of 200 rows and 200 columns"),
        ("data.hidden=0", "config.data.hidden is 0.0, and must be in (0, 1]"),
        (
            "model.options.vocabulary=100",
            "sonnets train has a byte 122, and the model is for bytes",
        ),
        ("batch_size=400", "sonnets train has 356 grids of text, and config.batch_size, 400, must"),
        ("data.name=digits", "digits is no set of texts: it has image, label"),
    ],
)
def test_configurations_that_do_not_fit(run_main, tmp_path, field, says):
    workdir = tmp_path / "run"
    code, out, err = run_main(
        "train", f"--config={TINY}", f"--workdir={workdir}", f"--config.{field}"
    )
    assert (code, out) == (2, ""), out + err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not workdir.exists()


def test_show_bytes_that_cannot_be_printed():
    tokens = np.array([[10, 9, 127, 255, 65, 32]])
    assert generation.render(tokens, np.zeros((1, 6), bool)) == ["↵???A "]
