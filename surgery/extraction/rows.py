# SPDX-License-Identifier: Apache-2.0
"""The ledger's rows: every tensor of TUNED in one class (law 1), with what it cost and what it left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.extraction.factorise import Factored
from surgery.extraction.findings import CalibrationFacts, Signal
from surgery.extraction.noise import remark
from surgery.extraction.pairing import Pair
from surgery.extraction.result import ExtractClass, ExtractRow
from surgery.extraction.storage_plan import DenseTensor, StoragePlan, Via, kept_size
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.linalg.coding import Coding
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    from surgery.extraction.proof import Error

__all__ = ["check_losses", "rows_of", "with_measured", "without"]

_CLASS: Mapping[Via, ExtractClass] = {
    "modules_to_save": "dense",
    "bias": "dense",
    "resized": "new rows",
    "token rows": "rows",
}


def check_losses(forms: StoragePlan, measures: Mapping[str, PairMeasure], tuned: Path, *, allow_loss: bool) -> None:
    """Law 1: a change that nothing holds is an error, unless the user allowed it.

    Raises:
        FitError: there is one.
    """
    if not forms.dropped or allow_loss:
        return
    total = math.fsum(found.energy for found in measures.values())
    share = math.fsum(measures[name].energy for name in forms.dropped) / total if total else 0.0
    reasons = "; ".join(f"'{show(name)}' ({why})" for name, why in list(forms.dropped.items())[:3])
    more = f"; and {len(forms.dropped) - 3} more" if len(forms.dropped) > 3 else ""
    raise FitError(
        f"{len(forms.dropped)} changed tensors, {share:.2%} of the change, would be lost: {reasons}{more}",
        file=tuned,
        tensor=next(iter(forms.dropped)),
        hint="--allow-loss leaves them out",
    )


def rows_of(
    pairs: Iterable[Pair],
    measures: Mapping[str, PairMeasure],
    factored: Mapping[str, Factored],
    forms: StoragePlan,
    ranks: Mapping[str, int],
    dtype: DType | Coding,
    signals: Mapping[str, Signal],
    magnitudes: Mapping[str, int],
    calibrated: Mapping[str, CalibrationFacts],
    *,
    asked: bool,
) -> tuple[ExtractRow, ...]:
    """By what was found while reading: residuals are those of the spectra.

    Args:
        pairs: Every tensor of TUNED.
        measures: By its names.
        factored: What is written, by unit path.
        forms: What becomes of each.
        ranks: By unit path.
        dtype: Of the factors.
        signals: By unit path.
        magnitudes: How many numbers a DoRA has beside its factors, by unit path.
        calibrated: By path of the units whose inputs were given.
        asked: Whether the user named the rank.

    Raises:
        FitError: a tensor changed and is in no class.
    """
    units = {name: unit for unit in forms.units for name in unit.names}
    kept: dict[str, list[DenseTensor]] = {}
    for one in forms.kept:
        kept.setdefault(one.name, []).append(one)
    total = math.fsum(measure.energy for measure in measures.values())
    rows, adrift = [], []
    for pair in pairs:
        if pair.match != "pair":
            stored = kept.pop(pair.name, [])
            row = ExtractRow(pair.name, pair.match, shape=pair.tuned.shape, why=pair.why)
            rows.append(_stored(row, stored) if stored else row)
            continue
        row = _measured(pair, measures[pair.name], total, forms.why.get(pair.name, ""))
        if pair.name in forms.dropped:
            row = replace(row, kind="dropped", residual=1.0, why=forms.dropped[pair.name])
        elif pair.name in kept:
            stored = kept.pop(pair.name)
            kind: ExtractClass = _CLASS[stored[0].via] if measures[pair.name].changed else "unchanged"
            if stored[0].shift is not None:
                kind = "corrected"
                row = replace(row, why="makes up for the mean of what its module's factors leave out")
            row = _stored(replace(row, kind=kind), stored)
            if kind == "unchanged":
                row = replace(row, why="PEFT stores its module whole")
        elif not measures[pair.name].changed:
            row = replace(row, kind="unchanged")
        elif pair.name in units:
            unit = units[pair.name]
            row = _low_rank(row, factored[unit.path], ranks[unit.path], dtype, magnitudes.get(unit.path, 0))
            row = _with_signal(row, signals[unit.path], asked=asked)
            row = replace(row, calibration=calibrated.get(unit.path))
        else:
            adrift.append(pair.name)
        rows.append(row)
    if adrift:
        raise FitError(f"{len(adrift)} changed tensors are in no class: {listing(adrift)}", tensor=adrift[0])
    # what is stored for a name that TUNED does not store itself: a tied head
    rows += [_stored(ExtractRow(name, "alias", why="tied"), stored) for name, stored in kept.items()]
    return tuple(rows)


def _measured(pair: Pair, found: PairMeasure, total: float, why: str) -> ExtractRow:
    return ExtractRow(
        pair.name,
        "dropped",
        shape=pair.tuned.shape,
        energy=found.energy,
        share=found.energy / total if total else 0.0,
        moved=found.moved_share,
        rms_ulp=found.rms_ulp,
        noise=math.sqrt(found.noise / found.energy) if found.energy else 0.0,
        why=why,
    )


def _stored(row: ExtractRow, stored: list[DenseTensor]) -> ExtractRow:
    """With the form and the cost of what is stored as TUNED has it."""
    sizes = [kept_size(one) for one in stored]
    numbers, nbytes = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    return replace(row, form=stored[0].via, parameters=numbers, nbytes=nbytes)


def _corrected(row: ExtractRow, error: Error, kept: DenseTensor) -> ExtractRow:
    """A bias that is TUNED's plus what was meant.

    Raises:
        ProofError: it is another.
    """
    from surgery.extraction.write import shifted

    meant = float((shifted(kept).double() - kept.tensor.read().double()).square().sum())
    if not math.isclose(error.left, meant, rel_tol=1e-6, abs_tol=1e-30):
        raise ProofError("read back, it is not the corrected bias that was meant", tensor=row.name)
    return replace(row, residual=error.residual if error.energy > 0 else 0.0)


def _with_signal(row: ExtractRow, signal: Signal, *, asked: bool) -> ExtractRow:
    notes = (row.why, remark(row.rank, signal, asked=asked))
    return replace(row, signal=signal, why="; ".join(note for note in notes if note))


def _low_rank(row: ExtractRow, found: Factored, rank: int, dtype: DType | Coding, magnitudes: int) -> ExtractRow:
    unit = found.unit
    position = unit.names.index(row.name)
    mine = unit.cost * rank
    part = mine // len(unit.names) + (
        mine % len(unit.names) if position == 0 else 0
    )  # experts share factors; nothing is counted twice
    left = found.residual(rank) / found.energy if found.energy else 0.0
    notes = [row.why] if row.why else []
    notes += [f"experts of '{unit.path}' in one pair of factors"] if len(unit.names) > 1 else []
    return replace(
        row,
        kind="low-rank",
        form="DoRA" if magnitudes else "LoRA",
        rank=rank,
        residual=math.sqrt(left),
        bound=max(piece.bound for piece in found.pieces),
        parameters=part + magnitudes,
        nbytes=dtype.nbytes(part) + magnitudes * 4,
        why="; ".join(notes),
    )


def without(rows: Iterable[ExtractRow], forms: StoragePlan, lost: Mapping[str, str]) -> tuple[ExtractRow, ...]:
    """The same rows where another format does not hold all that the PEFT folder does.

    Args:
        rows: Of the PEFT folder.
        forms: Of the same.
        lost: Path of a parameter -> why the format does not hold it.
    """
    why = {kept.name: lost[kept.path] for kept in forms.kept if kept.path in lost}
    why |= {name: lost[unit.path] for unit in forms.units if unit.path in lost for name in unit.names}
    nothing: dict[str, Any] = {"form": "", "rank": 0, "parameters": 0, "nbytes": 0, "signal": None, "calibration": None}
    return tuple(
        replace(row, kind="dropped", residual=1.0 if row.energy else 0.0, why=why[row.name], **nothing)
        if row.name in why and row.kind not in ("unchanged", "alias")
        else row
        for row in rows
    )


def with_measured(
    rows: Iterable[ExtractRow],
    errors: Mapping[str, Error],
    forms: StoragePlan,
    factored: Mapping[str, Factored],
    ranks: Mapping[str, int],
    dtype: DType,
    sizes: Mapping[str, float],
) -> tuple[ExtractRow, ...]:
    """The same rows with the residuals that were read back; `sizes` is ``||TUNED||_F`` of what became DoRA, by unit path.

    Raises:
        ProofError: one is not what was reported: the spectrum's for factors, none at all for copies.
    """
    from surgery.extraction.proof import agrees

    for unit in forms.units:
        energy = math.fsum(errors[name].energy for name in unit.names if name in errors)
        left = math.fsum(errors[name].left for name in unit.names if name in errors)
        reported = math.sqrt(factored[unit.path].residual(ranks[unit.path]) / factored[unit.path].energy)
        measured = math.sqrt(left / energy) if energy else 0.0
        whole = sizes.get(unit.path, 0.0) / math.sqrt(energy) if energy else 0.0
        if not agrees(measured, reported, dtype, whole):
            raise ProofError(
                f"read back, {measured:.4%} of the change is missing; {reported:.4%} was expected", tensor=unit.names[0]
            )
    found = []
    for row in rows:
        error = errors.get(row.name)
        if error is None:
            found.append(row)
            continue
        if row.kind == "corrected":
            found.append(_corrected(row, error, next(kept for kept in forms.kept if kept.name == row.name)))
            continue
        if row.kind in ("dense", "rows", "new rows") and error.left:
            raise ProofError(
                f"read back, it is not what TUNED has ({error.residual:.1e} of the change)", tensor=row.name
            )
        found.append(replace(row, residual=error.residual))
    return tuple(found)
