"""Where results go: sections of a page that each belong to one script, and tables in them."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Puts `text` between the marks of section `name`, which the page must have."""
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    page.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(command: str) -> str:
    """What was run, when, on what."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    device = jax.devices()[0].device_kind
    return (
        f"`{command}`, {datetime.date.today()}, commit `{commit}`, {os.cpu_count()} cores"
        f" ({platform.machine()}), {device}, jax {jax.__version__}."
    )
