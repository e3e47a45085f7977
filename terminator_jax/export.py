"""Exports a trained model for other programs. See `--help`."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from terminator_jax.errors import InputError, cannot_write
from terminator_jax.training import cli

DESCRIPTION = """\
Exports the trained model of a run as a file that other programs run.

    python -m terminator_jax.export runs/digits digits.zip            # for JAX alone
    python -m terminator_jax.export runs/digits digits.onnx           # for ONNX Runtime
    python -m terminator_jax.export runs/digits digits.safetensors    # for load_model

MODEL is the directory of a run, or its file model.safetensors. The format goes by the
suffix of OUT:

    stablehlo    .zip, and any other suffix: the program by jax.export for CPU, CUDA and TPU and
                 any batch, its classes, size and normalization in JSON, and the lines that load it
    onnx         .onnx: for ONNX Runtime and others, any batch; minutes for a large network
    safetensors  .safetensors: the weights, with the configuration as metadata

The program takes pictures as they are stored, uint8, and gives logits.
"""
SUFFIXES = {".zip": "stablehlo", ".onnx": "onnx", ".safetensors": "safetensors"}
BITS = {8: "uint8", 16: "uint16"}


def main(arguments: Sequence[str]) -> int:
    """Reads the flags and writes the file; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a run's directory, or a .safetensors file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--format", choices=SUFFIXES.values(), help="default: by the suffix of OUT")
    parser.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        default=8,
        help="of the values of the pictures, as in training (default: 8)",
    )
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (default: 23)")
    flags = parser.parse_args(arguments)
    form = flags.format or SUFFIXES.get(flags.out.suffix.lower(), "stablehlo")
    if flags.opset is not None and (form != "onnx" or flags.opset < 1):
        raise InputError(f"--opset is {flags.opset}, and must be 1 or more, for an .onnx file only")
    # Imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax import exporting

    if form == "onnx" and importlib.util.find_spec("jax2onnx") is None:
        raise InputError("jax2onnx is not installed: pip install 'terminator-jax[onnx]'")
    loaded, dtype = cli.load_model(flags.model), BITS[flags.bits]
    try:
        if form == "safetensors":
            exporting.copy_safetensors(Path(os.path.expanduser(flags.model)), flags.out)
        elif form == "onnx":
            exporting.write_onnx(loaded, flags.out, dtype=dtype, opset=flags.opset or 23)
        else:
            exporting.write_stablehlo(loaded, flags.out, dtype=dtype)
    except OSError as error:
        raise cannot_write(flags.out, error) from error
    print(f"{flags.out}: {form}, {flags.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main, extra="export")
