# SPDX-License-Identifier: Apache-2.0
"""The summary of an extraction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.extraction.figures import Layers, layers_of
from surgery.reports.output import DRY_RUN, PATH, counted
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Cell, Name, NameList, Phrase, Value

if TYPE_CHECKING:
    from surgery.extraction.result import ExtractResult

__all__ = ["extract_summary"]

_LAYERS = (
    Column("layers", "name"), Column("times", "integer", spare=2), Column("rank", "figure"), Column("share", "share"),
    Column("missing", "share"), Column("moved", "share", 1, spare=6), Column("rms/ulp", "number", 2, spare=5),
    Column("noise", "share", 1, spare=4), Column("signal", "figure"), Column("survives", "share", 1, spare=1),
    Column("class", spare=3),
)  # fmt: skip
_CHOICES = (
    Column("rank", "integer"), Column("layers"), Column("missing", "share"), Column("parameters", "count"),
    Column("size", "bytes"),
)  # fmt: skip


def extract_summary(result: ExtractResult, verbose: bool, output: Path | None) -> Summary:
    """The whole in figures, then like-named layers in one row, or each by itself if `verbose`."""
    sections: list[Section] = [Facts((*_facts(result), *_outcome(result, output)))]
    changed = [row for row in result.rows if row.energy or row.form]
    if changed:
        layers = layers_of(changed, apart=verbose)
        sections += [Table(_LAYERS, tuple(map(_layer, layers))), *_remarks(layers)]
        if len(layers) < len(changed):
            sections.append(Note("like-named layers are taken together", "omitted"))
    if result.table:
        choices = (
            (choice.rank, choice.layers, choice.residual, choice.parameters, choice.nbytes) for choice in result.table
        )
        sections.append(Table(_CHOICES, tuple(choices)))
    if result.output is None:
        sections.append(DRY_RUN)
    return Summary("Extraction", (*sections, *warning_notes(result.warnings)))


def _facts(result: ExtractResult) -> Iterator[tuple[str, Phrase]]:
    ranks = sorted({row.rank for row in result.rows if row.rank})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    noise = Value(result.noise, "share", 1)
    yield "tensors", counted(result.classes)
    moved = (
        Value(result.moved, "share", 1),
        " of the values moved; storage rounding makes up ",
        noise,
        " of the change",
    )
    yield "change", moved
    yield "adapter", (f"{spread}, ", Value(result.parameters, "count"), f" parameters, {result.dtype}")
    lost = ("; ", Value(result.lost, "share"), " of its energy was left out") if result.lost else ()
    if result.reproduced is not None:
        plain, refined = (Value(share, "share") for share in result.reproduced)
        yield "reproduced", (refined, " of the merged values bit for bit (plain factors: ", plain, ")")
    yield "held", ("all but ", Value(result.residual, "share"), " of the change", *lost)
    times = f"{result.saved:.3g} times smaller" if result.saved >= 1 else f"{1 / result.saved:.3g} times larger"
    copy = Value(result.tuned_nbytes, "bytes")
    yield "size", (Value(result.adapter_nbytes, "bytes"), f", {times} than the full copy's ", copy)


def _outcome(result: ExtractResult, output: Path | None) -> Iterator[tuple[str, Phrase]]:
    if result.kind is not None:
        yield "kind", f"{'DoRA' if result.kind.kind == 'dora' else 'LoRA'}: {result.kind.why}"
    if result.calibration is not None:
        yield "calibration", result.calibration.text
    if result.merged is not None:
        yield "origin", result.merged.text
    for finding in result.quantised:
        yield "quantised", finding
    if not math.isnan(result.survival):
        survives = Value(result.survival, "share", 1)
        yield "merging", ("keeps ", survives, " of the factors' update in BASE's stored type")
    if result.why_devices:
        yield "computed", f"on {', '.join(result.devices)}: {result.why_devices}"
    if result.output is not None:
        took = (" in ", Value(result.seconds, "seconds")) if result.seconds else ()
        yield "proof", "read back: it holds what was measured against TUNED"
        yield "wrote", (Name(output or result.output, PATH), *took)


def _layer(layer: Layers) -> tuple[Cell, ...]:
    figures = layer.share, layer.residual, layer.moved, layer.rms_ulp, layer.noise
    return layer.pattern, len(layer.rows), layer.ranks, *figures, layer.signal, layer.survival, layer.kind


def _remarks(layers: Iterable[Layers]) -> list[Section]:
    """Each remark once, with the layers that it is made of."""
    remarks: dict[str, list[str]] = {}
    for layer in layers:
        if layer.why:
            remarks.setdefault(layer.why, []).append(layer.pattern)
    rows = tuple((NameList(tuple(patterns), 2), why) for why, patterns in remarks.items())
    return [Table((Column("layers", "name"), Column("remark")), rows)] if rows else []
