# SPDX-License-Identifier: Apache-2.0
"""The rows of the ledger: every tensor of TUNED in exactly one class, with its cost and what is left of its change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.extraction.adapter import shifted
from surgery.extraction.extraction_plan import ExtractionPlan
from surgery.extraction.figures import ExtractClass, ExtractRow
from surgery.extraction.findings import CalibrationTotals
from surgery.extraction.noise import remark
from surgery.extraction.pairing import Pair
from surgery.extraction.proof import Residual, agrees, prove
from surgery.extraction.ranks import rank_table
from surgery.extraction.recovery import Recovery
from surgery.extraction.result import ExtractResult
from surgery.extraction.spectra import role_spectra
from surgery.extraction.storage_plan import DenseTensor, StoragePlan, Via, dense_size
from surgery.extraction.stream.tally import PairMeasure
from surgery.extraction.targets import LowRankTarget, sharing
from surgery.reports.selective import ChangedWeight, SelectiveTuning, selective_tuning
from surgery_formats import text
from surgery_formats.arrays import cast, energy
from surgery_formats.binding.bind import Binding
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.linalg.coding import CODINGS
from surgery_formats.models.base_name import base_name
from surgery_formats.storage.base import read_rows
from surgery_formats.text import listing

__all__ = ["coded_result", "predicted_result", "proved_result", "rows_without", "with_recovery"]

_CLASS: Mapping[Via, ExtractClass] = {
    "modules_to_save": "dense",
    "bias": "dense",
    "resized": "new rows",
    "token rows": "rows",
}


def predicted_result(plan: ExtractionPlan) -> ExtractResult:
    """The result as the spectra predict it.

    Raises:
        FitError: a changed tensor is in no class.
    """
    request, rows = plan.request, _predicted_rows(plan)
    nbytes = sum(row.nbytes for row in rows) if request.coding else plan.nbytes
    result = ExtractResult(
        None,
        plan.peft.name,
        plan.adapter.base_id,
        rows,
        request.coding.name if request.coding else request.dtype.label,
        nbytes,
        plan.checkpoints.tuned.nbytes,
        plan.warnings + _too_large(plan, nbytes),
        rank_table(
            plan.storage,
            plan.scan.factored,
            plan.scan.measures,
            request.stored,
            plan.checkpoints.base.main.role,
        )
        if request.table
        else (),
        plan.noise.survival,
        plan.noise.merged,
        plan.decision.facts,
        CalibrationTotals.of(plan.calibrated.facts.values()) if request.calibration is not None else None,
        plan.scan.findings,
        tuned=_tuned(plan),
        spectra=role_spectra(plan.scan.factored, plan.checkpoints.base.main.role),
        models=(base_name(plan.checkpoints.base), base_name(plan.checkpoints.tuned)),
    )
    return result if plan.recovery is None else with_recovery(result, plan.recovery)


def with_recovery(result: ExtractResult, recovery: Recovery) -> ExtractResult:
    """`result` with what was measured on a text, of the ranks of its table too."""
    scores = [recovery.ranks.get((choice.rank, choice.layers)) for choice in result.table]
    table = tuple(
        choice if score is None else replace(choice, score=score, recovered=recovery.share(score))
        for choice, score in zip(result.table, scores, strict=True)
    )
    return replace(result, recovery=recovery, table=table, warnings=result.warnings + recovery.remarks)


def _tuned(plan: ExtractionPlan) -> SelectiveTuning | None:
    """Which part of BASE changed, if that has a name."""
    base, pairs = plan.checkpoints.base.main, [pair for pair in plan.layout.pairs if pair.match == "pair"]
    changed = []
    for pair in pairs:
        measure = plan.scan.measures[pair.name]
        if measure.changed:
            rows, height = len(measure.rows), next(iter(pair.tuned.sizes), 1)
            some = 0 < rows < height
            numbers = rows * (pair.numel // height) if some else pair.numel
            changed.append(ChangedWeight(pair.name, base.role(pair.name), numbers, rows if some else None, height))
    found = selective_tuning(changed, [pair.name for pair in pairs], sum(pair.numel for pair in pairs))
    return found if found.named else None


def _too_large(plan: ExtractionPlan, nbytes: int) -> tuple[str, ...]:
    """A warning where the rank was looked for, and what was found is no smaller than a copy."""
    if not plan.request.goal.rank.above_noise or nbytes <= plan.checkpoints.tuned.nbytes:
        return ()
    said = (
        "the adapter is larger than TUNED: its change has no low rank, or is hidden by rounding; if you know the rank, "
        "give it (rank N)"
    )
    numbers = sum(target.cost * plan.ranks[target.path] for target in plan.storage.targets)
    rest = nbytes - plan.request.stored.nbytes(numbers)
    sizes = {coding.name: coding.nbytes(numbers) + rest for coding in CODINGS.values()}
    smaller = [name for name, size in sizes.items() if size < plan.checkpoints.tuned.nbytes]
    if smaller and plan.request.coding is None:
        said += f"; as {smaller[0]} codes it would have {text.nbytes(sizes[smaller[0]])} (factors {smaller[0]})"
    return (said,)


def proved_result(plan: ExtractionPlan, binding: Binding) -> ExtractResult:
    """The result as measured on the extraction, read back or about to be rendered, and bound to BASE.

    Raises:
        ProofError: it differs from what was measured.
    """
    residuals, result = prove(plan, binding), predicted_result(plan)
    for group in sharing(plan.storage.targets):
        names = dict.fromkeys(name for target in group for name in target.names)
        _check_residual(plan, group, [residuals[name] for name in names if name in residuals])
    dense = {tensor.name: tensor for tensor in plan.storage.dense_tensors}
    rows = (_proved_row(row, residuals.get(row.name), dense.get(row.name)) for row in result.rows)
    return replace(result, rows=tuple(rows))


def coded_result(plan: ExtractionPlan, binding: Binding) -> ExtractResult:
    """The result as measured on codes that were read back and bound to BASE.

    The conversion has proved that their error is the stated one.
    """
    residuals, result = prove(plan, binding, recognise=False), predicted_result(plan)
    rows = (replace(r, residual=residuals[r.name].relative) if r.name in residuals else r for r in result.rows)
    return replace(result, rows=tuple(rows))


def _check_residual(plan: ExtractionPlan, group: Sequence[LowRankTarget], residuals: list[Residual]) -> None:
    """Compare what is left of targets that have a tensor in common, or of one, with what was measured of its factors."""
    energy = math.fsum(residual.energy for residual in residuals)
    left = math.fsum(residual.left for residual in residuals)
    magnitudes = [
        plan.decision.magnitudes[target.path].size for target in group if target.path in plan.decision.magnitudes
    ]
    predicted = _left(plan, group)
    measured = math.sqrt(left / energy) if energy else 0.0
    whole = math.hypot(*magnitudes) / math.sqrt(energy) if energy else 0.0
    if not agrees(measured, predicted, plan.request.dtype, whole):
        raise ProofError(
            f"read back, {measured:.4%} of the change is missing; {predicted:.4%} was expected",
            tensor=group[0].names[0],
        )


def _left(plan: ExtractionPlan, group: Sequence[LowRankTarget]) -> float:
    """The share of the change of targets that their factors leave."""
    factored = [(plan.factored[target.path], plan.ranks[target.path]) for target in group]
    energy = math.fsum(factors.energy for factors, _ in factored)
    left = math.fsum(factors.residual(rank) for factors, rank in factored)
    return math.sqrt(left / energy) if energy else 0.0


def _proved_row(row: ExtractRow, residual: Residual | None, dense: DenseTensor | None) -> ExtractRow:
    if residual is None:
        return row
    if row.kind == "corrected" and dense is not None:
        return _corrected(row, residual, dense)
    if row.kind in ("dense", "rows", "new rows") and residual.left:
        raise ProofError(
            f"read back, it is not what TUNED has ({residual.relative:.1e} of the change)", tensor=row.name
        )
    return replace(row, residual=residual.relative)


def _predicted_rows(plan: ExtractionPlan) -> tuple[ExtractRow, ...]:
    targets: dict[str, list[LowRankTarget]] = {}
    for target in plan.storage.targets:
        for name in target.names:
            targets.setdefault(name, []).append(target)
    dense_by_name: dict[str, list[DenseTensor]] = {}
    for dense in plan.storage.dense_tensors:
        dense_by_name.setdefault(dense.name, []).append(dense)
    total = math.fsum(measure.energy for measure in plan.scan.measures.values())
    rows, unclassified = [], []
    for pair in plan.layout.pairs:
        if pair.match != "pair":
            stored = dense_by_name.pop(pair.name, [])
            row = ExtractRow(pair.name, pair.match, shape=pair.tuned.sizes, why=pair.why)
            rows.append(_stored(row, stored) if stored else row)
            continue
        row = _measured(pair, plan.scan.measures[pair.name], total, plan.storage.why.get(pair.name, ""))
        if pair.name in plan.storage.dropped:
            row = replace(row, kind="dropped", residual=1.0, why=plan.storage.dropped[pair.name])
        elif pair.name in dense_by_name:
            stored = dense_by_name.pop(pair.name)
            kind: ExtractClass = _CLASS[stored[0].via] if plan.scan.measures[pair.name].changed else "unchanged"
            if stored[0].shift is not None:
                kind = "corrected"
                row = replace(row, why="makes up for the mean of what its module's factors leave out")
            row = _stored(replace(row, kind=kind), stored)
            if kind == "unchanged":
                row = replace(row, why="PEFT stores its module whole")
        elif not plan.scan.measures[pair.name].changed:
            row = replace(row, kind="unchanged")
        elif pair.name in targets:
            row = _low_rank(plan, row, targets[pair.name])
        else:
            unclassified.append(pair.name)
        rows.append(row)
    if unclassified:
        raise FitError(
            f"{len(unclassified)} changed tensors are in no class: {listing(unclassified)}", tensor=unclassified[0]
        )
    # what is stored for a name that TUNED does not store itself: a tied head
    rows += [_stored(ExtractRow(name, "alias", why="tied"), stored) for name, stored in dense_by_name.items()]
    return tuple(rows)


def _measured(pair: Pair, measure: PairMeasure, total: float, why: str) -> ExtractRow:
    return ExtractRow(
        pair.name,
        "dropped",
        shape=pair.tuned.sizes,
        energy=measure.energy,
        share=measure.energy / total if total else 0.0,
        moved=measure.moved_share,
        rms_ulp=measure.rms_ulp,
        noise=math.sqrt(measure.noise / measure.energy) if measure.energy else 0.0,
        why=why,
    )


def _stored(row: ExtractRow, stored: list[DenseTensor]) -> ExtractRow:
    """The row with the form and the cost of its dense tensors."""
    sizes = [dense_size(dense) for dense in stored]
    numbers, nbytes = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    return replace(row, form=stored[0].via, parameters=numbers, nbytes=nbytes)


def _corrected(row: ExtractRow, measured: Residual, dense: DenseTensor) -> ExtractRow:
    """The row of a corrected bias.

    Raises:
        ProofError: the bias is not TUNED's plus the shift.
    """
    meant = energy(cast(shifted(dense), DType.F64) - cast(read_rows(dense.weight), DType.F64))
    if not math.isclose(measured.left, meant, rel_tol=1e-6, abs_tol=1e-30):
        raise ProofError("read back, it is not the corrected bias that was meant", tensor=row.name)
    return replace(row, residual=measured.relative if measured.energy > 0 else 0.0)


def _low_rank(plan: ExtractionPlan, row: ExtractRow, group: Sequence[LowRankTarget]) -> ExtractRow:
    """The row of a tensor whose change is held by factors: one pair, or one for each parameter that it is made into.

    Tensors that make one parameter share its cost, so that nothing is counted twice.
    """
    target = group[0]
    largest = max(group, key=lambda each: plan.ranks[each.path])
    rank, signal = plan.ranks[largest.path], plan.noise.signals[largest.path]
    found = [plan.decision.magnitudes.get(each.path) for each in group]
    magnitudes = sum(magnitude.count for magnitude in found if magnitude is not None)
    count, own_numbers = len(target.names), 0
    for each in group:
        numbers, holders = each.cost * plan.ranks[each.path], len(each.names)
        own_numbers += numbers // holders + (numbers % holders if row.name == each.names[0] else 0)
    notes = [row.why, _place(target) if count > 1 else ""]
    notes += [f"{len(group)} parameters of the model's class"] if len(group) > 1 else []
    notes.append(remark(rank, signal, asked=plan.request.goal.rank.number is not None))
    return replace(
        row,
        kind="low-rank",
        form="DoRA" if magnitudes else "LoRA",
        rank=rank,
        residual=_left(plan, group),
        bound=max(matrix.bound for each in group for matrix in plan.factored[each.path].matrices),
        parameters=own_numbers + magnitudes,
        nbytes=plan.request.stored.nbytes(own_numbers) + magnitudes * 4,
        signal=signal,
        calibration=plan.calibrated.facts.get(target.path),
        why="; ".join(note for note in notes if note),
    )


def _place(target: LowRankTarget) -> str:
    what = "experts" if target.form == "experts" else "parts"
    return f"{what} of '{target.path}' in one pair of factors"


def rows_without(rows: Iterable[ExtractRow], storage: StoragePlan, lost: Mapping[str, str]) -> tuple[ExtractRow, ...]:
    """The rows for a format that does not hold everything; `lost` says why it does not hold a parameter, by its path."""
    why = {dense.name: lost[dense.path] for dense in storage.dense_tensors if dense.path in lost}
    why |= {name: lost[target.path] for target in storage.targets if target.path in lost for name in target.names}
    nothing: dict[str, Any] = {"form": "", "rank": 0, "parameters": 0, "nbytes": 0, "signal": None, "calibration": None}
    return tuple(
        replace(row, kind="dropped", residual=1.0 if row.energy else 0.0, why=why[row.name], **nothing)
        if row.name in why and row.kind not in ("unchanged", "alias")
        else row
        for row in rows
    )
