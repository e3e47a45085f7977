"""Reads the golden vectors of `tests/golden/`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

_FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> SimpleNamespace:
    """The arrays of `golden/NAME.npz`: `grad/a.b` as `.grad["a.b"]`, `output` as `.output`.

    `.param`, `.input`, `.grad` and `.grad_input` are always there; `.config` is read from its JSON.
    Arrays are float64: use them in tests that take the fixture `x64`.

    >>> golden = load("label_smoothing")
    >>> golden.logits.shape, golden.logits.dtype
    ((7, 5), dtype('float64'))
    """
    found: dict[str, Any] = {"param": {}, "input": {}, "grad": {}, "grad_input": {}}
    with np.load(_FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            group, _, rest = key.partition("/")
            if rest:
                found.setdefault(group, {})[rest] = arrays[key]
            else:
                found[group] = arrays[key]
    if "config" in found:
        found["config"] = json.loads(str(found["config"]))
    return SimpleNamespace(**found)
