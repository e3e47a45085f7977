"""The examples of README.md and docs/layers.md run, and the latter has one of every layer."""

import re
from pathlib import Path

import jax
import pytest

from terminator_jax import layers

pytestmark = pytest.mark.usefixtures("unoptimized")

REPOSITORY = Path(__file__).parent.parent


def blocks(page):
    """The page's Python, by the heading above it and the number below that."""
    found, heading, number = {}, "", 0
    for part in re.finditer(
        r"^(#+ [^\n]*)$|^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        if part[1]:
            heading, number = part[1], 0
        else:
            number += 1
            found[f"{heading} {number}"] = part[2]
    return found


README = blocks((REPOSITORY / "README.md").read_text())
LAYERS = blocks((REPOSITORY / "docs" / "layers.md").read_text())
SHARED, *EXAMPLES = LAYERS


def run(*codes):
    """In a namespace of their own."""
    namespace = {"__name__": "example"}
    for code in codes:
        exec(compile(code, "example", "exec"), namespace)


def test_blocks_are_found():
    page = "# A\n```python\nx = 1\n# no heading\n```\n```\ntext\n```\n## B\n\n```python\ny\n```\n"
    page += "```python\nz\n```\n"
    assert blocks(page) == {"# A 1": "x = 1\n# no heading\n", "## B 1": "y\n", "## B 2": "z\n"}


@pytest.mark.parametrize("name", README)
def test_readme(name):
    """Traced only: computed one operation after the other, a whole network takes a minute."""
    jax.eval_shape(lambda: run(README[name]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers(name):
    run(LAYERS[SHARED], LAYERS[name])


def test_layers_has_an_example_of_each():
    """Under a heading that names it, importing it."""
    for layer in layers.__all__:
        named = [code for name, code in LAYERS.items() if f"`{layer}`" in name]
        assert any(re.search(rf"import .*\b{layer}\b", code) for code in named), layer
