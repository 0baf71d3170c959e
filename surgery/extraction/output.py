# SPDX-License-Identifier: Apache-2.0
"""Write an extraction, as it was planned or converted to another format, and prove it before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.adapter_card import LIBRARIES
from surgery.engine.adapter_output import WriteOptions, rendered_fingerprint, write_adapter
from surgery.engine.card import CARD
from surgery.engine.conversion import conversion_id, plan_conversion, prove_conversion
from surgery.engine.convert_result import ConvertResult
from surgery.engine.proof import read_back
from surgery.extraction.card import extraction_card
from surgery.extraction.extraction_plan import ExtractionPlan, Stopwatch
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import coded_result, predicted_result, proved_result, rows_without, with_recovery
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import Format, Rendering, what_to_tell
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.sets_beside import sets_beside
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery.extraction.evaluated import EvaluatedPair

__all__ = ["load_writer", "write_extraction"]


def write_extraction(
    plan: ExtractionPlan,
    target: Format,
    out: Path,
    stopwatch: Stopwatch,
    *,
    overwrite: bool,
    progress: Callback | None,
    evaluated: EvaluatedPair | None = None,
) -> ExtractResult:
    """Write what was decided to `out`, in the format `target`.

    With `evaluated` its recovery is measured: before PEFT's folder is written, whose model card states it, and of another
    format on what is read back of it, which may be codes or lack something. PEFT's file keeps to a budget of bytes;
    another format's may not, and a warning says so.

    Raises:
        FitError: `target` cannot hold all of it.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    written = _Progress(stopwatch, progress)
    inputs = [plan.checkpoints.base.path, plan.checkpoints.tuned.path]
    inputs += [] if plan.request.calibration is None else [plan.request.calibration.path]
    inputs += [] if evaluated is None else [evaluated.path]
    options = WriteOptions(out, tuple(inputs), _side_files(plan), overwrite, written, plan.request.workspace.workers)
    if target.name != plan.peft.name:
        planned = _converted(plan, target, evaluated, progress)
    else:
        if evaluated is not None:
            plan = evaluated.measured(plan, progress)
            stopwatch.lap("evaluating")
        planned = _as_planned(plan)
    result = predicted_result(plan)

    def prove(path: Path) -> Mapping[str, Any]:
        nonlocal result
        stopwatch.lap("syncing")
        if progress is not None:
            progress(Progress(plan.nbytes, plan.nbytes, "proving"))
        result, record = planned.prove(path)
        stopwatch.lap("proving")
        plan.check_unchanged()
        return record

    write_adapter(planned.rendering, target, planned.job, prove, options)
    stopwatch.lap("committing")
    return replace(result, output=out)


def load_writer() -> None:
    """Import what renders and reads back an adapter: once all is factorised, nothing else is left to wait for."""
    import surgery_formats.adapters.peft.read
    import surgery_formats.adapters.peft.write  # noqa: F401 - to have both loaded


def _side_files(plan: ExtractionPlan) -> Mapping[str, Path]:
    """TUNED's tokenizer, where its vocabulary grew."""
    if not any(dense.via == "resized" for dense in plan.storage.dense_tensors):
        return {}
    return sets_beside(plan.checkpoints.tuned.path).get("tokenizer", {})


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


@dataclass(frozen=True)
class _PlannedOutput:
    """An extraction in one format.

    Attributes:
        rendering: What will be written.
        job: Identifies it.
        prove: Given the path of what was written, returns what was measured on it and the record for the manifest.
    """

    rendering: Rendering
    job: str
    prove: Callable[[Path], tuple[ExtractResult, Mapping[str, Any]]]


def _as_planned(plan: ExtractionPlan) -> _PlannedOutput:
    """In the format in which it was planned: the factors that are read back are those that were measured."""

    def prove(path: Path) -> tuple[ExtractResult, Mapping[str, Any]]:
        result = proved_result(plan, _bound(plan, read_back(plan.peft, path)))
        return result, result.as_manifest()

    return _PlannedOutput(_carded(plan.rendering, plan, plan.peft), plan.id, prove)


def _converted(
    plan: ExtractionPlan, target: Format, evaluated: EvaluatedPair | None, progress: Callback | None
) -> _PlannedOutput:
    """Rendered by `target`: the extraction is proved before it is rendered, then what was written of it is compared."""
    binding, request = _bound(plan, plan.adapter), plan.request
    conversion = plan_conversion(
        plan.adapter,
        target,
        plan.checkpoints.base,
        binding,
        allow_loss=request.allow_loss,
        without_whole="a replacement is a whole parameter, such as a bias or a norm, and `to=peft` holds those",
    )
    entries = conversion.rendering.entries
    planned = ConvertResult(None, plan.peft.name, target.name, entries, warnings=plan.adapter.known_issues())

    def prove(path: Path) -> tuple[ExtractResult, Mapping[str, Any]]:
        result = proved_result(plan, binding)
        converted = prove_conversion(path, conversion, planned)
        if request.coding is not None:
            result = coded_result(plan, _bound(plan, read_back(target, path)))
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        lost = {e.site: f"{target.name} cannot hold it ({e.detail})" for e in entries if e.outcome == "dropped"}
        warnings = [*result.warnings, *(f"'{show(site)}': {why}" for site, why in lost.items())]
        warnings += what_to_tell(conversion.rendering, target)
        budget = request.goal.rank.most_size
        if budget is not None and budget.measure == "bytes" and size > budget.limit:
            warnings.append(
                f"the budget is {budget.limit:,} bytes, which PEFT keeps to; {target.name} takes {size:,} for the same"
            )
        rows = rows_without(result.rows, plan.storage, lost)
        result = replace(result, format=target.name, rows=rows, adapter_nbytes=size, warnings=tuple(warnings))
        if evaluated is not None:
            result = with_recovery(result, evaluated.recovery(plan, read_back(target, path), progress))
        return result, {**converted.as_manifest(), "extract": result.as_manifest()}

    job = conversion_id(conversion, [rendered_fingerprint(plan.rendering)])
    return _PlannedOutput(_carded(conversion.rendering, plan, target), job, prove)


def _carded(rendering: Rendering, plan: ExtractionPlan, target: Format) -> Rendering:
    """`rendering` with a model card, where the hub has one for folders of `target`."""
    if target.name not in LIBRARIES:
        return rendering
    predicted = predicted_result(plan)
    lost = {entry.site: entry.detail for entry in rendering.entries if entry.outcome == "dropped"}
    predicted = replace(predicted, rows=rows_without(predicted.rows, plan.storage, lost))
    coded = target is not plan.peft and plan.request.coding is not None
    text = extraction_card(plan, predicted, LIBRARIES[target.name], before_codes=coded)
    return replace(rendering, small_files={**rendering.small_files, CARD: text})


def _bound(plan: ExtractionPlan, adapter: Adapter) -> Binding:
    """`adapter` bound to BASE: once the extraction itself, and anew what is read back, which proves the written file."""
    return bind([(adapter, 1.0)], plan.checkpoints.base)
