# SPDX-License-Identifier: Apache-2.0
"""The summary of an extraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.extraction.extract_charts import extract_charts, rank_advice, rank_chart
from surgery.extraction.figures import ExtractRow, Layers, RankChoice, layers_of
from surgery.extraction.recovery import Recovery
from surgery.extraction.recovery_table import recovery_sections
from surgery.extraction.spectra import RoleSpectrum
from surgery.reports.output import DRY_RUN
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Cell, NameList, Phrase

__all__ = ["extract_summary"]

_LAYERS = (
    Column("layers", "name", says="weights whose names differ in the number of the layer only"),
    Column("times", "integer", spare=2, says="how many weights these are"),
    Column("rank", "figure", says="directions that the factors of each have"),
    Column("share", "share", says="of the energy (squared norm) of the whole change, what these weights have"),
    Column("missing", "share", says="of the change of these weights, what the adapter lacks (Frobenius norm): 0 % is TUNED"),
    Column("moved", "share", 1, spare=6, says="values that differ from BASE"),
    Column("rms/ulp", "number", 2, spare=5, says="size of the change (root mean square), in spacings of the stored type"),
    Column("noise", "share", 1, spare=4, says="of the change, what rounding to the stored type makes up by itself"),
    Column("signal", "figure", says="directions of the change above that noise, of those that a matrix has; >=: no more were computed"),
    Column("survives", "share", 1, spare=1, says="of the factors' update, what is left when it is merged into BASE's stored type"),
    Column("class", spare=3, says="low-rank: stored as factors; dense: stored in full; dropped: left out"),
)  # fmt: skip


def extract_summary(
    title: str,
    facts: Iterable[tuple[str, Phrase]],
    rows: Sequence[ExtractRow],
    table: Sequence[RankChoice],
    spectra: Sequence[RoleSpectrum],
    warnings: tuple[str, ...],
    *,
    recovery: Recovery | None,
    verbose: bool,
    dry_run: bool,
) -> Summary:
    """The whole in figures, then like-named layers in one row, or each by itself if `verbose`.

    Args:
        title: Of the page.
        facts: The whole, in figures.
        rows: Every tensor of TUNED.
        table: Other ranks and fewer layers.
        spectra: Of the change, by role.
        warnings: What the user should know.
        recovery: What the adapter is worth on a text, if that was measured.
        verbose: Each layer.
        dry_run: Whether nothing was written.
    """
    sections: list[Section] = [Facts(tuple(facts))]
    if recovery is not None:
        sections += recovery_sections(recovery)
    changed = [row for row in rows if row.energy or row.form]
    if changed:
        layers = layers_of(changed, apart=verbose)
        sections += [Table(_LAYERS, tuple(map(_layer, layers)), "What became of the change"), *_remarks(layers)]
        if len(layers) < len(changed):
            sections.append(Note("like-named layers are taken together", "omitted"))
    if table:
        sections += [rank_chart(table), rank_advice(table)]
    sections += extract_charts(spectra, rows)
    if dry_run:
        sections.append(DRY_RUN)
    return Summary(title, (*sections, *warning_notes(warnings)))


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
    return [Table((Column("layers", "name"), Column("remark")), rows, "Remarks")] if rows else []
