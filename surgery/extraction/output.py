# SPDX-License-Identifier: Apache-2.0
"""Write an extraction, in PEFT's format or rendered by another, and prove it before it appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.engine.adapter_output import WriteOptions, rendered_fingerprint, write_adapter
from surgery.engine.conversion import plan_conversion, write_conversion
from surgery.engine.convert_result import ConvertResult
from surgery.extraction.extraction_plan import ExtractionPlan, Stopwatch
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import coded_result, predicted_result, proved_result, rows_without
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import Format
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import bind
from surgery_formats.linalg.matrix import one_thread
from surgery_formats.text import show

__all__ = ["write_extraction"]

_TOKENIZER = ("vocab.json", "merges.txt")  # and whatever has ``token`` in its name


def write_extraction(
    plan: ExtractionPlan,
    target: Format,
    out: Path,
    stopwatch: Stopwatch,
    *,
    budget: int | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    progress: Callback | None = None,
) -> ExtractResult:
    """Write what was decided.

    Args:
        plan: What was decided.
        target: The format.
        out: File or folder to make.
        stopwatch: Laps for the timings.
        budget: Bytes that PEFT's file keeps to; another format's may not, and a warning says so.
        allow_loss: Leave out what `target` cannot hold.
        overwrite: Replace what is there, atomically.
        progress: Called with every step.

    Raises:
        FitError: `target` cannot hold all of it.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    written = _Progress(stopwatch, progress)
    inputs = [plan.checkpoints.base.path, plan.checkpoints.tuned.path]
    inputs += [] if plan.request.calibration is None else [plan.request.calibration.path]
    options = WriteOptions(out, tuple(inputs), _side_files(plan), overwrite, written)
    if target.name == plan.peft.name:
        result = _write_peft(plan, options, written)
    else:
        result = _write_converted(plan, target, options, written, budget, allow_loss=allow_loss)
    return replace(result, output=out)


def _side_files(plan: ExtractionPlan) -> Mapping[str, Path]:
    """TUNED's tokenizer, where its vocabulary grew."""
    if not any(dense.via == "resized" for dense in plan.storage.dense_tensors):
        return {}
    files = plan.checkpoints.tuned.side_files
    return {name: path for name, path in files if "token" in name or name in _TOKENIZER}


@dataclass
class _Progress:
    """Hands steps on, and ends the lap of writing with the last tensor."""

    stopwatch: Stopwatch
    callback: Callback | None

    def __call__(self, step: Progress) -> None:
        if step.done == step.total:
            self.stopwatch.lap("writing")
        if self.callback is not None:
            self.callback(step)


def _write_peft(plan: ExtractionPlan, options: WriteOptions, progress: _Progress) -> ExtractResult:
    result, stopwatch = predicted_result(plan), progress.stopwatch

    def prove(folder: Path) -> Mapping[str, Any]:
        nonlocal result
        stopwatch.lap("syncing")
        if progress.callback is not None:
            progress.callback(Progress(plan.nbytes, plan.nbytes, "proving"))
        result = proved_result(plan, read_adapter(folder))
        stopwatch.lap("proving")
        plan.check_unchanged()
        return result.as_manifest()

    with one_thread():  # a team of threads for every one of hundreds of small tensors costs more than it does
        write_adapter(plan.rendering, plan.peft, plan.id, prove, options)
    stopwatch.lap("committing")
    return result


def _write_converted(
    plan: ExtractionPlan,
    target: Format,
    options: WriteOptions,
    progress: _Progress,
    budget: int | None,
    *,
    allow_loss: bool,
) -> ExtractResult:
    """Rendered by `target`, with the proof of a conversion besides.

    The written adapter is compared with the one that was proved here.
    """
    base, result = plan.checkpoints.base, proved_result(plan, plan.adapter)
    progress.stopwatch.lap("proving")

    def check(path: Path, conversion: ConvertResult) -> Mapping[str, Any]:
        nonlocal result
        if plan.request.coding is not None:
            result = coded_result(plan, target.read(path))
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        dropped = (entry for entry in conversion.entries if entry.outcome == "dropped")
        lost = {entry.site: f"{target.name} cannot hold it ({entry.detail})" for entry in dropped}
        warnings = [*result.warnings, *(f"'{show(site)}': {why}" for site, why in lost.items())]
        if budget is not None and size > budget:
            warnings.append(
                f"the budget is {budget:,} bytes, which PEFT keeps to; {target.name} takes {size:,} for the same"
            )
        rows = rows_without(result.rows, plan.storage, lost)
        result = replace(result, format=target.name, rows=rows, adapter_nbytes=size, warnings=tuple(warnings))
        plan.check_unchanged()
        return {"extract": result.as_manifest()}

    binding = bind([(plan.adapter, 1.0)], base)
    conversion = plan_conversion(plan.adapter, target, base, binding, allow_loss=allow_loss)
    planned = ConvertResult(
        None, plan.peft.name, target.name, conversion.rendering.entries, warnings=plan.adapter.known_issues()
    )
    write_conversion(conversion, options, planned, source_id=rendered_fingerprint(plan.rendering), check=check)
    progress.stopwatch.lap("converting")
    return result
