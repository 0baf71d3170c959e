# SPDX-License-Identifier: Apache-2.0
"""What every loader here does: ``load_NAME.py BASE ADAPTER OUT [BASE ADAPTER OUT ...]``, run by the Python of its own environment.

OUT.json says whether the program loaded the adapter, or its refusal; OUT.npz what it then holds: ``logits`` (tokens, vocabulary)
after ``IDS``, or ``delta/NAME``, what is added to the base's parameter NAME, and ``value/NAME``, what replaces it. Programs that run
something else save its outputs under names of their own. ``-`` for ADAPTER is the base alone. Nothing of this project is imported
here, and nothing of PEFT but where PEFT is the program.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["IDS", "Found", "Loaded", "run"]

IDS = [5, 17, 99, 3, 64, 127, 20, 41, 77, 11, 2, 8]
Found = dict[str, np.ndarray]
Loaded = (
    Found | Callable[[], Found]
)  # what a program says, or how to read what it holds: a fault of that is none of its own


def _refusal(error: BaseException, base: Path, adapter: Path) -> str:
    kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
    text = f"{kind}{error}".replace(str(adapter), "ADAPTER").replace(str(base), "BASE")
    return " ".join(text.split())[:300]


def run(opened: Callable[[Path], Callable[[Path | None], Loaded]], *packages: str) -> None:
    """Load every adapter of the command line into the base before it with ``opened(base)``, and write what became of each."""
    versions = {package: metadata.version(package) for package in packages}
    last, load = "", None
    for given, named, out in zip(sys.argv[1::3], sys.argv[2::3], map(Path, sys.argv[3::3]), strict=True):
        base, adapter = Path(given).resolve(), None if named == "-" else Path(named).resolve()
        said: dict[str, Any] = {"versions": versions}
        if load is None or given != last:
            last, load = given, opened(base)
        try:
            loaded = load(adapter)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            said["refused"] = _refusal(error, base, adapter or base)
        else:
            found = loaded() if callable(loaded) else loaded
            np.savez(out.with_suffix(".npz"), **{name: np.asarray(value, np.float32) for name, value in found.items()})
        out.with_suffix(".json").write_text(json.dumps(said))
