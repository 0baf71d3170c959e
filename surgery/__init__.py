# SPDX-License-Identifier: Apache-2.0
"""Operations on models and adapters, as files: merge, convert, inspect, report.

Each verb of the command ``surgery`` is a function here of the same name; importing this module imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery._version import __version__

if TYPE_CHECKING:
    from surgery.comparison.adapters import AdapterDiff
    from surgery.comparison.checkpoints import CheckpointDiff
    from surgery.verbs.bench import BenchResult, bench
    from surgery.verbs.combine import CombineResult, combine
    from surgery.verbs.convert import ConvertResult, convert
    from surgery.verbs.diff import diff
    from surgery.verbs.env import EnvironmentReport, env
    from surgery.verbs.export_onnx import ExportResult, export_onnx
    from surgery.verbs.extract_lora import ExtractResult, extract_lora
    from surgery.verbs.formats import Catalogue, formats
    from surgery.verbs.inspect import AdapterReport, CheckpointReport, inspect
    from surgery.verbs.merge import MergeResult, merge
    from surgery.verbs.report import SavingsReport, report
    from surgery.verbs.resize import resize
    from surgery.verbs.run import RunResult, run
    from surgery.verbs.verify import Verification, verify

_HOMES = {
    "AdapterReport": "surgery.verbs.inspect",
    "Catalogue": "surgery.verbs.formats",
    "CheckpointReport": "surgery.verbs.inspect",
    "EnvironmentReport": "surgery.verbs.env",
    "SavingsReport": "surgery.verbs.report",
    "formats": "surgery.verbs.formats",
    "env": "surgery.verbs.env",
    "inspect": "surgery.verbs.inspect",
    "report": "surgery.verbs.report",
    "MergeResult": "surgery.verbs.merge",
    "merge": "surgery.verbs.merge",
    "ConvertResult": "surgery.verbs.convert",
    "convert": "surgery.verbs.convert",
    "AdapterDiff": "surgery.comparison.adapters",
    "CheckpointDiff": "surgery.comparison.checkpoints",
    "CombineResult": "surgery.verbs.combine",
    "combine": "surgery.verbs.combine",
    "diff": "surgery.verbs.diff",
    "resize": "surgery.verbs.resize",
    "ExtractResult": "surgery.verbs.extract_lora",
    "extract_lora": "surgery.verbs.extract_lora",
    "BenchResult": "surgery.verbs.bench",
    "ExportResult": "surgery.verbs.export_onnx",
    "RunResult": "surgery.verbs.run",
    "bench": "surgery.verbs.bench",
    "export_onnx": "surgery.verbs.export_onnx",
    "run": "surgery.verbs.run",
    "Verification": "surgery.verbs.verify",
    "verify": "surgery.verbs.verify",
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
    "combine",
    "convert",
    "diff",
    "env",
    "export_onnx",
    "extract_lora",
    "formats",
    "inspect",
    "merge",
    "report",
    "resize",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
