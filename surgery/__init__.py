# SPDX-License-Identifier: Apache-2.0
"""Operations on models and adapters, as files: merge, convert, inspect, report.

Each verb of the command ``surgery`` is a function here of the same name; importing this module imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgery.convert import ConvertResult, convert
    from surgery.merge import MergeResult, merge

_HOMES = {
    "MergeResult": "surgery.merge",
    "merge": "surgery.merge",
    "ConvertResult": "surgery.convert",
    "convert": "surgery.convert",
}

__all__ = ["ConvertResult", "MergeResult", "__version__", "convert", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
