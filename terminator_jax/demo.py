"""Shows a page on which a trained model can be tried. See `--help`."""

from collections.abc import Sequence

from terminator_jax.errors import InputError
from terminator_jax.training import cli

DESCRIPTION = """\
Shows a page in the browser on which the trained model of a run can be tried.

    python -m terminator_jax.demo runs/digits
    python -m terminator_jax.demo runs/digits --port=0    # any port that is free

Drop a picture on the page, choose a file, or draw: it shows the likeliest classes and, for a
Terminator, the pixel-level scores of each block. A picture of another size or colour is scaled and
converted. Ctrl-C and SIGTERM end it.

Only this machine can see the page, unless --host names another address of it, such as 0.0.0.0: then
everybody who reaches that address can use the model.
"""


def main(arguments: Sequence[str]) -> int:
    """Reads the flags and serves the page until Ctrl-C; returns the exit code."""
    parser = cli.Parser(DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a run's directory, or a .safetensors file")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    flags = parser.parse_args(arguments)
    if not 0 <= flags.port < 2**16:
        raise InputError(f"--port is {flags.port}, and must be from 0 to {2**16 - 1}")
    # Imports JAX, which --help and a wrong flag need not wait for.
    from terminator_jax import page

    try:
        server = page.Server(cli.load_model(flags.model), flags.host, flags.port)
    except OSError as error:
        raise InputError(
            f"cannot listen at --host={flags.host} --port={flags.port}: {error.strerror}"
        ) from error
    print("compiling", flush=True)
    try:
        with server:
            print(f"the page is at {server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    return 0


if __name__ == "__main__":
    cli.run(main, extra="demo", is_service=True)
