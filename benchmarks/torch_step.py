"""The training step for CIFAR-10 beside the same formulas in plain PyTorch, on one device.

    python benchmarks/torch_step.py                 # every case, into docs/performance.md
    python benchmarks/torch_step.py --check         # compares losses and gradients in float64
    python benchmarks/torch_step.py --results FILE  # on a machine without the page: into a file
    python benchmarks/torch_step.py --page FILE     # a file's results into docs/performance.md

Needs PyTorch, for the device that JAX runs on. Both sides start from the same weights, meet the
same pictures and take turns; products of float32 numbers may be by TF32 on both, as is JAX's
default on a GPU. A step is the forward pass with dropout, the loss, all gradients and Kar3.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX starts: both sides share the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing
import torch
from flax import nnx
from torch_terminator import Kar3, TorchTerminator

from terminator_jax.convert import terminator_to_release
from terminator_jax.models import Terminator, TerminatorConfig
from terminator_jax.training import config as configs
from terminator_jax.training.optimizer import make_optimizer
from terminator_jax.training.state import new_state, split_model
from terminator_jax.training.step import make_train_step
from terminator_jax.training.tasks import Task, make_task

CIFAR = Path(__file__).parent.parent / "experiments" / "cifar10.py"
STEPS = 5  # of a measured call
RATE = 1e-6  # weights hardly move while they are timed
# Losses after one step, in float32: phases of 1e5 rad are rounded differently.
TOLERANCE = 0.05


class Case(NamedTuple):
    """A step of so many pictures."""

    dtype: str
    batch: int


CASES = {
    "float32-64": Case("float32", 64),
    "float32-256": Case("float32", 256),
    "bfloat16-64": Case("bfloat16", 64),
    "bfloat16-256": Case("bfloat16", 256),
}
# How PyTorch runs it: keywords of `torch.compile`, or None.
WAYS = {
    "PyTorch, eager": None,
    "PyTorch, torch.compile": {},
    "PyTorch, torch.compile with CUDA graphs": {"mode": "reduce-overhead"},
}
OURS = "terminator_jax"


class Side(NamedTuple):
    """One step: what runs it and returns its loss, what waits for it, and what it took to get."""

    step: Callable[[], Any]
    wait: Callable[[], None]
    compile: float
    temporary: int

    def run(self) -> None:
        """A measured call."""
        for _ in range(STEPS):
            self.step()
        self.wait()


def make(case: Case) -> tuple[Task, Terminator, dict[str, np.ndarray]]:
    """The network at its first values, and a batch."""
    fields = [f"dtype={case.dtype}", f"batch_size={case.batch}", f"optimizer.learning_rate={RATE}"]
    config = configs.read(CIFAR, [f"--config.{field}" for field in fields])
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (case.batch, 32, 32, 3), dtype=np.uint8)
    task = make_task(config)
    return task, task.make_model(), {"image": pictures, "label": rng.integers(0, 10, case.batch)}


def ours(case: Case) -> Side:
    """The library's step."""
    task, model, batch = make(case)
    tx, schedule = make_optimizer(task.config, steps_per_epoch=100)
    model_def, params, model_state = split_model(model)
    state = new_state(params, model_state, tx, seed=0)
    batch = jax.device_put(batch | {"label": batch["label"].astype(np.int32)})
    step = jax.jit(make_train_step(task, model_def, tx, schedule), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    found = [state, {}]

    def run():
        found[:] = compiled(found[0], batch)
        return found[1]["loss"]

    def wait():
        jax.block_until_ready(found)

    return Side(run, wait, seconds, compiled.memory_analysis().temp_size_in_bytes)


def theirs(case: Case, options: dict | None) -> Side:
    """PyTorch's step."""
    task, model, batch = make(case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = TorchTerminator(model.config)
    load(network, model)
    network.to(device).train()
    optimizer = Kar3(network.parameters(), RATE)
    data = task.config.data
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (data.mean, data.std))
    images, labels = (torch.from_numpy(batch[name]).to(device) for name in ("image", "label"))
    low = case.dtype == "bfloat16"

    def loss(images, labels):
        x = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return network.loss(x.bfloat16() if low else x, labels)

    compute, change = loss, optimizer.step
    if options is not None:
        compute, change = torch.compile(loss, **options), torch.compile(optimizer.step)

    def run():
        for parameter in network.parameters():
            parameter.grad = None
        value = compute(images, labels)
        value.backward()
        change()
        return value.detach()

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    for _ in range(2):
        run()
    wait()
    seconds = time.perf_counter() - start
    before = peak = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        wait()
        peak = torch.cuda.max_memory_allocated()
    return Side(run, wait, seconds, peak - before)


def load(network: TorchTerminator, model: Terminator) -> None:
    """Gives the network the model's weights."""
    weights = terminator_to_release(model).items()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights})


def measure(case: Case) -> dict[str, dict]:
    """All sides of a case, by name: milliseconds of a step, seconds to get it, memory it takes."""
    sides, found = {OURS: ours(case)}, {}
    loss = float(sides[OURS].step())
    for way, options in WAYS.items():
        try:
            side = theirs(case, options)
        except Exception as error:  # of PyTorch's compiler: the others count all the same
            found[way] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        other = float(side.step())
        print(f"{way}: loss {other:.6f}, ours {loss:.6f}", flush=True)
        if not abs(other - loss) < TOLERANCE * loss:
            raise SystemExit("the losses are not the same")
        sides[way] = side
    seconds = timing.medians({name: s.run for name, s in sides.items()}, repeats=9, seconds=30)
    for name, side in sides.items():
        ms = seconds[name] / STEPS * 1e3
        found[name] = {"ms": ms, "compile": side.compile, "temporary": side.temporary}
    return found


def check() -> None:
    """Compares logits, loss and every gradient of a small network in float64."""
    jax.config.update("jax_enable_x64", True)
    config = TerminatorConfig.cifar(size=(8, 8))
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    model = Terminator(config, **kinds, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...] + 0.02 * rng.normal(size=variable.shape))
    x, labels = rng.normal(size=(4, 8, 8, 3)), rng.integers(0, 10, 4)
    graph, params = nnx.split(model)
    task = make_task(configs.read(CIFAR, ["--config.dtype=float64"]))

    def loss(params):
        model = nnx.merge(graph, params)
        _, terms = task.loss_terms(model, x, labels, None)
        return sum(terms.values())

    value, grads = jax.value_and_grad(loss)(params)
    network = TorchTerminator(config).double().eval()
    load(network, model)
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    found = network.loss(images, torch.from_numpy(labels))
    found.backward()
    expected = terminator_to_release(nnx.merge(graph, grads))
    worst = max(
        np.linalg.norm(p.grad.numpy() - expected[name]) / (1e-6 + np.linalg.norm(expected[name]))
        for name, p in network.named_parameters()
    )
    print(f"loss {float(value)} and {found.item()}; gradients differ by {worst:.1e} at most")
    if not (abs(value - found.item()) < 1e-10 and worst < 1e-6):
        raise SystemExit("the networks are not the same")


HEAD = ["", "batch", "dtype", "ms a step", "pictures/s", "of our time", "first steps, s", "GB"]


def rows(case: Case, found: dict[str, dict]) -> list[list[str]]:
    """A case's lines of the table."""
    lines = []
    for name in (OURS, *WAYS):
        own = found[name]
        numbers = [own.get("error", "–").replace("|", "/"), *"––––"]
        if "ms" in own:
            numbers = [
                f"{own['ms']:.1f}", f"{case.batch / own['ms'] * 1e3:,.0f}",
                f"{own['ms'] / found[OURS]['ms']:.2f}", f"{own['compile']:.0f}",
                f"{own['temporary'] / 1e9:.2f}" if own["temporary"] else "–",
            ]  # fmt: skip
        lines.append([name, str(case.batch), case.dtype, *numbers])
    return lines


def page(results: dict) -> str:
    """The section of `docs/performance.md`."""
    lines = [
        row for name, case in CASES.items() if name in results for row in rows(case, results[name])
    ]
    return f"{results['conditions']}\n\n{report.table(HEAD, lines)}"


def conditions() -> str:
    """What was run, when, on what."""
    return (
        f"`python benchmarks/torch_step.py`, {datetime.date.today()},"
        f" {jax.devices()[0].device_kind}, jax {jax.__version__}, PyTorch {torch.__version__}."
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compares, and measures nothing")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES), help="only these")
    parser.add_argument("--results", type=Path, help="writes this file and no page")
    parser.add_argument("--page", type=Path, help="writes the page of such a file")
    flags = parser.parse_args()
    if flags.check:
        return check()
    if flags.page:
        return report.write_section("torch-step", page(json.loads(flags.page.read_text())))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    results = {"conditions": conditions()}
    for name in flags.case:
        results[name] = measure(CASES[name])
        for line in rows(CASES[name], results[name]):
            print(*line, sep=" | ", flush=True)
        if flags.results:
            flags.results.write_text(json.dumps(results, indent=2) + "\n")
    if not flags.results:
        report.write_section("torch-step", page(results))
    return None


if __name__ == "__main__":
    main()
