# SPDX-License-Identifier: Apache-2.0
"""Operations on models and adapters, as files.

Nouns: `open` gives a `Checkpoint` or an `Adapter`. Verbs: each command of ``surgery`` is a function of the same name, which takes paths or
what was opened. Results: frozen records. Faults: `SurgeryError` and what derives from it. Importing this package imports neither torch,
numpy nor onnx: every name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery._version import __version__ as __version__
from surgery_formats.errors import *  # noqa: F403

if TYPE_CHECKING:
    from surgery.comparison.checkpoints import CheckpointDiff as CheckpointDiff
    from surgery.comparison.graph_diff import GraphDiff as GraphDiff
    from surgery.comparison.results import AdapterDiff as AdapterDiff
    from surgery.engine.inputs import open as open
    from surgery.onnx.recover.result import RecoveryResult as RecoveryResult
    from surgery.onnx.run.sampling import Sampling as Sampling
    from surgery.rank import Rank as Rank
    from surgery.reports.result import Result as Result
    from surgery.verbs.apply import ApplyResult as ApplyResult
    from surgery.verbs.apply import apply as apply
    from surgery.verbs.bench import BenchResult as BenchResult
    from surgery.verbs.bench import bench as bench
    from surgery.verbs.check import CheckResult as CheckResult
    from surgery.verbs.check import check as check
    from surgery.verbs.combine import CombineResult as CombineResult
    from surgery.verbs.combine import combine as combine
    from surgery.verbs.convert import ConvertResult as ConvertResult
    from surgery.verbs.convert import convert as convert
    from surgery.verbs.diff import diff as diff
    from surgery.verbs.env import EnvironmentReport as EnvironmentReport
    from surgery.verbs.env import env as env
    from surgery.verbs.eval import EvalResult as EvalResult
    from surgery.verbs.eval import eval as eval
    from surgery.verbs.export_onnx import ExportResult as ExportResult
    from surgery.verbs.export_onnx import export_onnx as export_onnx
    from surgery.verbs.extract_lora import ExtractResult as ExtractResult
    from surgery.verbs.extract_lora import extract_lora as extract_lora
    from surgery.verbs.fingerprint import FingerprintResult as FingerprintResult
    from surgery.verbs.fingerprint import fingerprint as fingerprint
    from surgery.verbs.fold import FoldResult as FoldResult
    from surgery.verbs.fold import fold as fold
    from surgery.verbs.formats import Catalogue as Catalogue
    from surgery.verbs.formats import formats as formats
    from surgery.verbs.insert import DeltaResult as DeltaResult
    from surgery.verbs.insert import FreshResult as FreshResult
    from surgery.verbs.insert import insert as insert
    from surgery.verbs.inspect import AdapterReport as AdapterReport
    from surgery.verbs.inspect import ArrayFileReport as ArrayFileReport
    from surgery.verbs.inspect import CheckpointReport as CheckpointReport
    from surgery.verbs.inspect import GraphReport as GraphReport
    from surgery.verbs.inspect import inspect as inspect
    from surgery.verbs.layers import LayersResult as LayersResult
    from surgery.verbs.layers import layers as layers
    from surgery.verbs.locate import LocateResult as LocateResult
    from surgery.verbs.locate import locate as locate
    from surgery.verbs.merge import MergeResult as MergeResult
    from surgery.verbs.merge import merge as merge
    from surgery.verbs.prompt_bake import BakeResult as BakeResult
    from surgery.verbs.prompt_bake import prompt_bake as prompt_bake
    from surgery.verbs.prompt_combine import prompt_combine as prompt_combine
    from surgery.verbs.prompt_convert import PromptResult as PromptResult
    from surgery.verbs.prompt_convert import prompt_convert as prompt_convert
    from surgery.verbs.prompt_nearest import EffectReport as EffectReport
    from surgery.verbs.prompt_nearest import NearestReport as NearestReport
    from surgery.verbs.prompt_nearest import prompt_nearest as prompt_nearest
    from surgery.verbs.prompt_show import PromptReport as PromptReport
    from surgery.verbs.prompt_show import prompt_show as prompt_show
    from surgery.verbs.prompt_transfer import prompt_transfer as prompt_transfer
    from surgery.verbs.report import SavingsReport as SavingsReport
    from surgery.verbs.report import report as report
    from surgery.verbs.resize import resize as resize
    from surgery.verbs.run import RunResult as RunResult
    from surgery.verbs.run import run as run
    from surgery.verbs.strip import StripResult as StripResult
    from surgery.verbs.strip import strip as strip
    from surgery.verbs.unmerge import UnmergeResult as UnmergeResult
    from surgery.verbs.unmerge import unmerge as unmerge
    from surgery.verbs.verify import Verification as Verification
    from surgery.verbs.verify import verify as verify
    from surgery_formats.canonical.adapter import Adapter as Adapter
    from surgery_formats.canonical.adapter import WeightedAdapter as WeightedAdapter
    from surgery_formats.models.checkpoint import Checkpoint as Checkpoint
else:
    from surgery_formats import errors as _errors
    from surgery_formats.lazy import lazy as _lazy

    __getattr__, __dir__, __all__ = _lazy(
        __name__,
        {
            "surgery._version": ["__version__"],
            "surgery.comparison.results": ["AdapterDiff"],
            "surgery.comparison.graph_diff": ["GraphDiff"],
            "surgery.onnx.recover.result": ["RecoveryResult"],
            "surgery.comparison.checkpoints": ["CheckpointDiff"],
            "surgery.engine.inputs": ["open"],
            "surgery.onnx.run.sampling": ["Sampling"],
            "surgery.rank": ["Rank"],
            "surgery.reports.result": ["Result"],
            "surgery.verbs.apply": ["ApplyResult", "apply"],
            "surgery.verbs.bench": ["BenchResult", "bench"],
            "surgery.verbs.check": ["CheckResult", "check"],
            "surgery.verbs.combine": ["CombineResult", "combine"],
            "surgery.verbs.convert": ["ConvertResult", "convert"],
            "surgery.verbs.diff": ["diff"],
            "surgery.verbs.env": ["EnvironmentReport", "env"],
            "surgery.verbs.eval": ["EvalResult", "eval"],
            "surgery.verbs.export_onnx": ["ExportResult", "export_onnx"],
            "surgery.verbs.extract_lora": ["ExtractResult", "extract_lora"],
            "surgery.verbs.fingerprint": ["FingerprintResult", "fingerprint"],
            "surgery.verbs.fold": ["FoldResult", "fold"],
            "surgery.verbs.formats": ["Catalogue", "formats"],
            "surgery.verbs.insert": ["DeltaResult", "FreshResult", "insert"],
            "surgery.verbs.inspect": ["AdapterReport", "ArrayFileReport", "CheckpointReport", "GraphReport", "inspect"],
            "surgery.verbs.layers": ["LayersResult", "layers"],
            "surgery.verbs.locate": ["LocateResult", "locate"],
            "surgery.verbs.merge": ["MergeResult", "merge"],
            "surgery.verbs.prompt_bake": ["BakeResult", "prompt_bake"],
            "surgery.verbs.prompt_combine": ["prompt_combine"],
            "surgery.verbs.prompt_convert": ["PromptResult", "prompt_convert"],
            "surgery.verbs.prompt_nearest": ["EffectReport", "NearestReport", "prompt_nearest"],
            "surgery.verbs.prompt_show": ["PromptReport", "prompt_show"],
            "surgery.verbs.prompt_transfer": ["prompt_transfer"],
            "surgery.verbs.report": ["SavingsReport", "report"],
            "surgery.verbs.resize": ["resize"],
            "surgery.verbs.run": ["RunResult", "run"],
            "surgery.verbs.strip": ["StripResult", "strip"],
            "surgery.verbs.unmerge": ["UnmergeResult", "unmerge"],
            "surgery.verbs.verify": ["Verification", "verify"],
            "surgery_formats.canonical.adapter": ["Adapter", "WeightedAdapter"],
            "surgery_formats.errors": _errors.__all__,
            "surgery_formats.models.checkpoint": ["Checkpoint"],
        },
    )
