# SPDX-License-Identifier: Apache-2.0
"""The rows of the ledger: every tensor of TUNED in exactly one class, with its cost and what is left of its change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.extraction.adapter import shifted
from surgery.extraction.factorise import TargetFactors
from surgery.extraction.findings import CalibrationFacts, Signal
from surgery.extraction.noise import remark
from surgery.extraction.pairing import Pair
from surgery.extraction.result import ExtractClass, ExtractRow
from surgery.extraction.storage_plan import DenseTensor, StoragePlan, Via, dense_size
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.linalg.coding import Coding
from surgery_formats.storage.base import read_rows
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    from surgery.extraction.proof import Residual

__all__ = ["check_losses", "ledger_rows", "rows_with_residuals", "rows_without"]

_CLASS: Mapping[Via, ExtractClass] = {
    "modules_to_save": "dense",
    "bias": "dense",
    "resized": "new rows",
    "token rows": "rows",
}


def check_losses(storage: StoragePlan, measures: Mapping[str, PairMeasure], tuned: Path, *, allow_loss: bool) -> None:
    """Refuse changes that no form holds, unless the user allowed their loss.

    Raises:
        FitError: there are such changes.
    """
    if not storage.dropped or allow_loss:
        return
    total = math.fsum(measure.energy for measure in measures.values())
    share = math.fsum(measures[name].energy for name in storage.dropped) / total if total else 0.0
    reasons = "; ".join(f"'{show(name)}' ({why})" for name, why in list(storage.dropped.items())[:3])
    more = f"; and {len(storage.dropped) - 3} more" if len(storage.dropped) > 3 else ""
    raise FitError(
        f"{len(storage.dropped)} changed tensors, {share:.2%} of the change, would be lost: {reasons}{more}",
        file=tuned,
        tensor=next(iter(storage.dropped)),
        hint="--allow-loss leaves them out",
    )


def ledger_rows(
    pairs: Iterable[Pair],
    measures: Mapping[str, PairMeasure],
    factored: Mapping[str, TargetFactors],
    storage: StoragePlan,
    ranks: Mapping[str, int],
    dtype: DType | Coding,
    signals: Mapping[str, Signal],
    magnitudes: Mapping[str, int],
    calibrated: Mapping[str, CalibrationFacts],
    *,
    asked: bool,
) -> tuple[ExtractRow, ...]:
    """Rows with the residuals that the spectra predict.

    Args:
        pairs: Every tensor of TUNED.
        measures: By TUNED's names.
        factored: The stored factors, by target path.
        storage: The form of every change.
        ranks: By target path.
        dtype: Type or codes of the factors.
        signals: By target path.
        magnitudes: Number of magnitudes that a DoRA has beside its factors, by target path.
        calibrated: Effect of calibration inputs, by target path.
        asked: Whether the user gave the rank.

    Raises:
        FitError: a changed tensor is in no class.
    """
    targets = {name: target for target in storage.targets for name in target.names}
    dense_by_name: dict[str, list[DenseTensor]] = {}
    for dense in storage.dense_tensors:
        dense_by_name.setdefault(dense.name, []).append(dense)
    total = math.fsum(measure.energy for measure in measures.values())
    rows, unclassified = [], []
    for pair in pairs:
        if pair.match != "pair":
            stored = dense_by_name.pop(pair.name, [])
            row = ExtractRow(pair.name, pair.match, shape=pair.tuned.sizes, why=pair.why)
            rows.append(_stored(row, stored) if stored else row)
            continue
        row = _measured(pair, measures[pair.name], total, storage.why.get(pair.name, ""))
        if pair.name in storage.dropped:
            row = replace(row, kind="dropped", residual=1.0, why=storage.dropped[pair.name])
        elif pair.name in dense_by_name:
            stored = dense_by_name.pop(pair.name)
            kind: ExtractClass = _CLASS[stored[0].via] if measures[pair.name].changed else "unchanged"
            if stored[0].shift is not None:
                kind = "corrected"
                row = replace(row, why="makes up for the mean of what its module's factors leave out")
            row = _stored(replace(row, kind=kind), stored)
            if kind == "unchanged":
                row = replace(row, why="PEFT stores its module whole")
        elif not measures[pair.name].changed:
            row = replace(row, kind="unchanged")
        elif pair.name in targets:
            target = targets[pair.name]
            row = _low_rank(row, factored[target.path], ranks[target.path], dtype, magnitudes.get(target.path, 0))
            row = _with_signal(row, signals[target.path], asked=asked)
            row = replace(row, calibration=calibrated.get(target.path))
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
    meant = float((shifted(dense).double() - read_rows(dense.weight).double()).square().sum())
    if not math.isclose(measured.left, meant, rel_tol=1e-6, abs_tol=1e-30):
        raise ProofError("read back, it is not the corrected bias that was meant", tensor=row.name)
    return replace(row, residual=measured.relative if measured.energy > 0 else 0.0)


def _with_signal(row: ExtractRow, signal: Signal, *, asked: bool) -> ExtractRow:
    notes = (row.why, remark(row.rank, signal, asked=asked))
    return replace(row, signal=signal, why="; ".join(note for note in notes if note))


def _low_rank(row: ExtractRow, factors: TargetFactors, rank: int, dtype: DType | Coding, magnitudes: int) -> ExtractRow:
    target = factors.target
    position = target.names.index(row.name)
    numbers = target.cost * rank
    own_numbers = numbers // len(target.names) + (
        numbers % len(target.names) if position == 0 else 0
    )  # experts share factors; nothing is counted twice
    left = factors.residual(rank) / factors.energy if factors.energy else 0.0
    notes = [row.why] if row.why else []
    notes += [f"experts of '{target.path}' in one pair of factors"] if len(target.names) > 1 else []
    return replace(
        row,
        kind="low-rank",
        form="DoRA" if magnitudes else "LoRA",
        rank=rank,
        residual=math.sqrt(left),
        bound=max(matrix.bound for matrix in factors.matrices),
        parameters=own_numbers + magnitudes,
        nbytes=dtype.nbytes(own_numbers) + magnitudes * 4,
        why="; ".join(notes),
    )


def rows_without(rows: Iterable[ExtractRow], storage: StoragePlan, lost: Mapping[str, str]) -> tuple[ExtractRow, ...]:
    """The rows for a format that does not hold everything.

    Args:
        rows: Rows of the whole extraction.
        storage: The form of every change.
        lost: Why the format does not hold a parameter, by its path.
    """
    why = {dense.name: lost[dense.path] for dense in storage.dense_tensors if dense.path in lost}
    why |= {name: lost[target.path] for target in storage.targets if target.path in lost for name in target.names}
    nothing: dict[str, Any] = {"form": "", "rank": 0, "parameters": 0, "nbytes": 0, "signal": None, "calibration": None}
    return tuple(
        replace(row, kind="dropped", residual=1.0 if row.energy else 0.0, why=why[row.name], **nothing)
        if row.name in why and row.kind not in ("unchanged", "alias")
        else row
        for row in rows
    )


def rows_with_residuals(
    rows: Iterable[ExtractRow],
    residuals: Mapping[str, Residual],
    storage: StoragePlan,
    factored: Mapping[str, TargetFactors],
    ranks: Mapping[str, int],
    dtype: DType,
    sizes: Mapping[str, float],
) -> tuple[ExtractRow, ...]:
    """The rows with measured residuals; `sizes` is ``||TUNED||_F`` of DoRA targets, by path.

    Raises:
        ProofError: a residual is not the predicted one, or a copy differs from TUNED.
    """
    from surgery.extraction.proof import agrees

    for target in storage.targets:
        energy = math.fsum(residuals[name].energy for name in target.names if name in residuals)
        left = math.fsum(residuals[name].left for name in target.names if name in residuals)
        reported = math.sqrt(factored[target.path].residual(ranks[target.path]) / factored[target.path].energy)
        measured = math.sqrt(left / energy) if energy else 0.0
        whole = sizes.get(target.path, 0.0) / math.sqrt(energy) if energy else 0.0
        if not agrees(measured, reported, dtype, whole):
            raise ProofError(
                f"read back, {measured:.4%} of the change is missing; {reported:.4%} was expected",
                tensor=target.names[0],
            )
    measured_rows = []
    for row in rows:
        left_over = residuals.get(row.name)
        if left_over is None:
            measured_rows.append(row)
            continue
        if row.kind == "corrected":
            measured_rows.append(
                _corrected(row, left_over, next(dense for dense in storage.dense_tensors if dense.name == row.name))
            )
            continue
        if row.kind in ("dense", "rows", "new rows") and left_over.left:
            raise ProofError(
                f"read back, it is not what TUNED has ({left_over.relative:.1e} of the change)", tensor=row.name
            )
        measured_rows.append(replace(row, residual=left_over.relative))
    return tuple(measured_rows)
