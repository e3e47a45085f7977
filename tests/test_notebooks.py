"""The notebooks run, in a smaller setting, and their two forms say the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))

# CIFAR-10 is downloaded from this process itself: a few random pictures in its own format.
RUN = """
import runpy, sys
import serve_archives
serve_archives.redirect(serve_archives.Server(), ["cifar10"])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def source_cells(text):
    """`(kind, text)` of the cells of a source in jupytext's percent format."""
    _, *parts = re.split(r"^# %%(.*)$", text, flags=re.MULTILINE)
    cells = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        if mark.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            cells.append(("code", body.strip()))
    return cells


def notebook(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


def outputs(source):
    """All outputs of a committed notebook."""
    return [output for cell in notebook(source)["cells"] for output in cell.get("outputs", ())]


def test_source_cells():
    text = "# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1  # %% no mark\n\n\n# %%\ny\n"
    assert source_cells(text) == [
        ("markdown", "# A\n\nb"),
        ("code", "x = 1  # %% no mark"),
        ("code", "y"),
    ]


def test_there_are_three():
    assert [source.stem for source in SOURCES] == ["kernels_and_context", "layers", "train"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_pair_says_the_same(source):
    """If not, `make notebooks` has not been run since the source changed."""
    cells = notebook(source)["cells"]
    pairs = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]
    assert pairs == source_cells(source.read_text())


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_outputs_are_there_and_small(source):
    """Of one run from top to bottom, with figures, and with neither errors nor warnings."""
    code = [cell for cell in notebook(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(source))
    assert not [
        o for o in outputs(source) if o["output_type"] == "error" or o.get("name") == "stderr"
    ]
    assert source.with_suffix(".ipynb").stat().st_size < 500_000


def test_one_owner():
    """`make owner` has to find the account wherever it is named, and to name it alike."""
    pages = [REPOSITORY / "README.md", *SOURCES, *(s.with_suffix(".ipynb") for s in SOURCES)]
    names = {
        page.name: set(re.findall(r"github(?:\.com)?/([^/]+)/terminator-jax", page.read_text()))
        for page in pages
    }
    assert all(len(found) == 1 for found in names.values()), names
    assert len(set().union(*names.values())) == 1, names


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_runs(source, tmp_path):
    """Top to bottom, in an empty folder, without network and without warnings."""
    settings = {
        "NOTEBOOK_SIZE": "tiny",
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "data")]),
    }
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(source)],
        env=inherited | settings, cwd=tmp_path, timeout=600,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
