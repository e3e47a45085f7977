"""The training step compiled for TPUs that are not there: time, work, traffic and memory.

    python benchmarks/tpu_compile.py                  # every case, into docs/performance.md
    python benchmarks/tpu_compile.py --case 2x2-jit   # one case, into the results' file

Needs libtpu in an environment of its own (`make tpu-compile`), and no TPU: `jax.experimental.
topologies` describes the chips and libtpu compiles for them. Nothing runs, so all figures but the
seconds are the compiler's own estimates for one chip.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import report
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from terminator_jax.layers import SFNEBlock, sfne
from terminator_jax.training import config as configs
from terminator_jax.training.optimizer import make_optimizer
from terminator_jax.training.parallel import make_parallel
from terminator_jax.training.state import new_state, split_model
from terminator_jax.training.step import make_train_step
from terminator_jax.training.tasks import make_task

ROOT = Path(__file__).parent.parent
LIMIT = 12 * 60  # seconds of a case, tracing included
PICTURES = 50_000  # of an epoch, which the schedule counts in


class Step(NamedTuple):
    """A training step: `batch` pictures on each chip of a topology."""

    topology: str
    parallel: str
    dtype: str
    batch: int
    experiment: str = "cifar10"
    remat: bool = False


class Block(NamedTuple):
    """One block forward and with its gradients on one chip, written down as `way`."""

    way: str
    dtype: str = "float32"
    topology: str = "v5e:1x1"
    channels: int = 144
    skips: tuple[int, ...] = (72, 36)
    batch: int = 64


CASES = {
    "2x2-jit": Step("v5e:2x2", "jit", "bfloat16", 64),
    "2x2-jit-float32": Step("v5e:2x2", "jit", "float32", 64),
    "2x2-pmap": Step("v5e:2x2", "pmap", "bfloat16", 64),
    "1x1-large": Step("v5e:1x1", "jit", "bfloat16", 1024, remat=True),
    "4x4-jit": Step("v5e:4x4", "jit", "bfloat16", 64),
    "16x16-jit": Step("v5e:16x16", "jit", "bfloat16", 64),
    "digits": Step("v5e:2x2", "jit", "bfloat16", 64, "digits"),
    "digits-pmap": Step("v5e:2x2", "pmap", "bfloat16", 64, "digits"),
    "digits-4x4": Step("v5e:4x4", "jit", "bfloat16", 64, "digits"),
    "digits-16x16": Step("v5e:16x16", "jit", "bfloat16", 64, "digits"),
    "mnist": Step("v5e:2x2", "jit", "bfloat16", 64, "mnist"),
    "block": Block("fused"),
    "block-bfloat16": Block("fused", "bfloat16"),
    "block-literal": Block("reference"),
}


def devices_of(topology: str) -> list[jax.Device]:
    """The chips of a topology such as "v5e:2x2"."""
    shape = topology.split(":")[1].split("x")
    alone = dict(chips_per_host_bounds=(1, 1, 1)) if set(shape) == {"1"} else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices


def lower_step(case: Step) -> jax.stages.Lowered:
    """The step as a run has it, on shapes in place of arrays."""
    devices = devices_of(case.topology)
    total = case.batch * len(devices)
    overrides = dict(
        batch_size=total, eval_batch_size=total, parallel=case.parallel, dtype=case.dtype,
        remat=case.remat,
    )  # fmt: skip
    config = configs.read(
        ROOT / "experiments" / f"{case.experiment}.py",
        [f"--config.{name}={value}" for name, value in overrides.items()],
    )
    mode = make_parallel(config, devices)
    task = make_task(config, mode.axis_name)
    tx, schedule = make_optimizer(config, max(1, PICTURES // total))
    model_def, params, model_state = split_model(nnx.eval_shape(task.make_model))
    state = jax.eval_shape(lambda p, o: new_state(p, o, tx, config.seed), params, model_state)
    step = mode.compile(make_train_step(task, model_def, tx, schedule), donate=True)
    rows = (total,) if mode.axis_name is None else (len(devices), case.batch)
    picture = (*task.model_config.size, task.model_config.channels)
    batch = {
        "image": jax.ShapeDtypeStruct((*rows, *picture), jnp.uint8),
        "label": jax.ShapeDtypeStruct(rows, jnp.int32),
    }
    return step.lower(state, batch)


def lower_block(case: Block) -> jax.stages.Lowered:
    """A block with its gradients by parameters and inputs."""
    size = (32, 32)
    make = lambda: SFNEBlock(  # noqa: E731
        size,
        case.channels,
        factor=2,
        skips=case.skips,
        dtype=case.dtype,
        implementation=case.way,
        rngs=nnx.Rngs(0),
    )
    graph, params, other = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def both(params, other, maps, dy):
        def forward(params, maps):
            return nnx.merge(graph, params, other, copy=True)(maps[0], maps[1:])

        y, pullback = jax.vjp(forward, params, maps)
        return y, pullback(dy)

    def shape(channels):
        return jax.ShapeDtypeStruct((case.batch, *size, channels), case.dtype)

    maps = [shape(c) for c in (case.channels, *case.skips)]
    one = NamedSharding(Mesh(np.array(devices_of(case.topology)), ("chip",)), P())
    step = jax.jit(both, in_shardings=one, out_shardings=one)
    with mock.patch.object(sfne, "REFERENCE_CONVOLUTION", "fft"):
        return step.lower(params, other, maps, shape(2 * case.channels))


def compile_case(case: Step | Block, keep: Path | None) -> dict:
    """What compiling a case takes, and what the compiler says of the program."""
    lower: Callable = lower_step if isinstance(case, Step) else lower_block
    start = time.perf_counter()
    lowered = lower(case)
    traced = time.perf_counter()
    result = {"trace": traced - start}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return result | {"compile": time.perf_counter() - traced, "error": first_line(error)}
    result["compile"] = time.perf_counter() - traced
    text = compiled.as_text()
    if keep:
        keep.write_text(text, encoding="utf-8")
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    count, size = collectives(text)
    return result | {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "collectives": count,
        "exchanged": size,
    }


def first_line(error: Exception) -> str:
    """What libtpu says of a program that it does not take."""
    return str(error).strip().splitlines()[0]


EXCHANGE = re.compile(
    r"= (?P<shape>.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(-done)?\("
)
ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")


def collectives(text: str) -> tuple[int, int]:
    """How many exchanges a program has, and the bytes of their results on one chip.

    Of an asynchronous one, the end counts and not the start.

    Example:
        >>> collectives("%a = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%b, %c), channel_id=1")
        (1, 32)
    """
    shapes = [found["shape"] for found in EXCHANGE.finditer(text)]
    return len(shapes), sum(array_bytes(shape) for shape in shapes)


def array_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays as HLO writes it."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * (int(bits or 8) // 8)
        for kind, bits, dims in ARRAY.findall(shape)
        if kind in ("f", "bf", "s", "u", "c", "pred")
    )


def run_apart(name: str, results: Path, arguments: list[str]) -> None:
    """One case in a process of its own, stopped at the limit."""
    command = [sys.executable, __file__, "--case", name, "--results", str(results), *arguments]
    try:
        failed = subprocess.run(command, timeout=LIMIT).returncode
        if failed:
            save(results, name, {"error": f"ended with {failed}"})
    except subprocess.TimeoutExpired:
        save(results, name, {"error": f"> {LIMIT // 60} min"})


def load(results: Path) -> dict[str, dict]:
    """What has been measured so far, by case."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def save(results: Path, name: str, result: dict) -> None:
    """Adds a case to the results' file."""
    results.write_text(
        json.dumps(load(results) | {name: result}, indent=2) + "\n", encoding="utf-8"
    )


def amounts(result: dict, images: int) -> list[str]:
    """The columns that steps and blocks share; `images` on one chip."""
    trace, seconds = (
        f"{result[name]:.0f}" if name in result else "–" for name in ("trace", "compile")
    )
    if "error" in result:
        return [trace, result["error"].replace("|", "/"), "–", "–", "–", "–"]
    return [
        trace,
        seconds,
        f"{result['flops'] / 1e9:,.1f}",
        f"{result['bytes'] / 1e9:.1f}",
        f"{result['bytes'] / images / 1e6:.0f}",
        f"{result['temporary'] / 1e6:,.0f}",
    ]


SHARED = ["trace s", "compile s", "GFLOP", "GB", "MB per image", "temporary MB"]


def steps_table(results: dict[str, dict]) -> str:
    """A row for each training step."""
    head = ["network", "chips", "by", "dtype", "global batch", *SHARED, "exchanges", "MB of them"]
    rows = []
    for name, case in CASES.items():
        if isinstance(case, Step) and name in results:
            found = results[name]
            total = case.batch * math.prod(map(int, case.topology.split(":")[1].split("x")))
            exchanges = ["–", "–"]
            if "error" not in found:
                exchanges = [str(found["collectives"]), f"{found['exchanged'] / 1e6:.1f}"]
            dtype = f"{case.dtype}, remat" if case.remat else case.dtype
            labels = [case.experiment, case.topology, case.parallel, dtype, f"{total:,}"]
            rows.append([*labels, *amounts(found, case.batch), *exchanges])
    return report.table(head, rows)


def blocks_table(results: dict[str, dict]) -> str:
    """A row for each way to write a block, and each one's share of the literal one's amounts."""
    literal = results.get("block-literal", {})
    rows = []
    for name, case in CASES.items():
        if isinstance(case, Block) and name in results:
            found = results[name]
            share = f"{found['bytes'] / literal['bytes']:.2f}" if "bytes" in literal else "–"
            rows.append([f"`{case.way}`", case.dtype, *amounts(found, case.batch), share])
    return report.table(["block", "dtype", *SHARED, "GB, of the literal one's"], rows)


def page(results: dict[str, dict]) -> str:
    """The section of `docs/performance.md`."""
    parts = [
        report.conditions("python benchmarks/tpu_compile.py"),
        f"Compiled by libtpu {version('libtpu')}; all amounts are of one chip and one step, as the"
        " compiler counts them.",
        steps_table(results),
        "One block of 144 channels, factor 2, skips of 72 and 36, on 64 maps of 32×32,"
        " forward and with all gradients, by the library and by its formulas as written down, with"
        " convolutions by FFT:",
        blocks_table(results),
    ]
    missing = [f"`{name}`" for name in CASES if name not in results]
    if missing:
        parts.append(f"Not compiled yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", help="only these, and writes no page")
    parser.add_argument("--page", action="store_true", help="writes the page of what there is")
    parser.add_argument("--hlo", type=Path, help="a folder to keep the compiled programs in")
    default = Path(tempfile.gettempdir()) / "tpu_compile.json"
    parser.add_argument("--results", type=Path, default=default, help="where results add up")
    flags = parser.parse_args()
    # Before libtpu is loaded: no metadata of a TPU machine to ask for, no TPU to be locked.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    for name in flags.case or ():
        result = compile_case(CASES[name], flags.hlo and flags.hlo / f"{name}.txt")
        save(flags.results, name, result)
        print(name, json.dumps(result), flush=True)
    if not flags.case:
        for name in () if flags.page else CASES:
            run_apart(name, flags.results, ["--hlo", str(flags.hlo)] if flags.hlo else [])
        report.write_section("tpu", page(load(flags.results)))


if __name__ == "__main__":
    main()
