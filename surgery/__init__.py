# SPDX-License-Identifier: Apache-2.0
"""Operations on models and adapters, as files: merge, convert, inspect, report.

Each verb of the command ``surgery`` is a function here of the same name; importing this module imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgery.catalogue import Catalogue, catalogue
    from surgery.combine import CombineResult, combine
    from surgery.convert import ConvertResult, convert
    from surgery.diff import diff
    from surgery.diff_adapters import AdapterDiff
    from surgery.diff_checkpoints import CheckpointDiff
    from surgery.environment import EnvironmentReport, environment
    from surgery.extract import ExtractResult, extract_lora
    from surgery.inspect import AdapterReport, CheckpointReport, inspect
    from surgery.merge import MergeResult, merge
    from surgery.onnx.bench import BenchResult, bench
    from surgery.onnx.export import ExportResult, export_onnx
    from surgery.onnx.run.text import RunResult, run
    from surgery.resize import resize
    from surgery.savings import SavingsReport, report
    from surgery.verify import Verification, verify

_HOMES = {
    "AdapterReport": "surgery.inspect",
    "Catalogue": "surgery.catalogue",
    "CheckpointReport": "surgery.inspect",
    "EnvironmentReport": "surgery.environment",
    "SavingsReport": "surgery.savings",
    "catalogue": "surgery.catalogue",
    "environment": "surgery.environment",
    "inspect": "surgery.inspect",
    "report": "surgery.savings",
    "MergeResult": "surgery.merge",
    "merge": "surgery.merge",
    "ConvertResult": "surgery.convert",
    "convert": "surgery.convert",
    "AdapterDiff": "surgery.diff_adapters",
    "CheckpointDiff": "surgery.diff_checkpoints",
    "CombineResult": "surgery.combine",
    "combine": "surgery.combine",
    "diff": "surgery.diff",
    "resize": "surgery.resize",
    "ExtractResult": "surgery.extract",
    "extract_lora": "surgery.extract",
    "BenchResult": "surgery.onnx.bench",
    "ExportResult": "surgery.onnx.export",
    "RunResult": "surgery.onnx.run.text",
    "bench": "surgery.onnx.bench",
    "export_onnx": "surgery.onnx.export",
    "run": "surgery.onnx.run.text",
    "Verification": "surgery.verify",
    "verify": "surgery.verify",
}

__all__ = [
    "AdapterDiff",
    "AdapterReport",
    "BenchResult",
    "Catalogue",
    "CheckpointDiff",
    "CheckpointReport",
    "CombineResult",
    "ConvertResult",
    "EnvironmentReport",
    "ExportResult",
    "ExtractResult",
    "MergeResult",
    "RunResult",
    "SavingsReport",
    "Verification",
    "__version__",
    "bench",
    "catalogue",
    "combine",
    "convert",
    "diff",
    "environment",
    "export_onnx",
    "extract_lora",
    "inspect",
    "merge",
    "report",
    "resize",
    "run",
    "verify",
]


class _Verbs(ModuleType):
    """Keeps a verb from being hidden by the module of the same name.

    Importing ``surgery.merge`` makes the import system set that module as the attribute ``merge`` of this package; the
    attribute has to stay the function. ``from surgery.merge import ...`` finds the module all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Verbs


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
