# SPDX-License-Identifier: Apache-2.0
"""The result of an extraction: every tensor of TUNED in one class, and the totals.

Only records of figures; importing them does not import torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from surgery.extraction.findings import CalibrationFacts, CalibrationTotals, KindFacts, MergedLoRA, Signal, six_digits
from surgery.reports.output import DRY_RUN, PATH, counted, nbytes_of, written
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.targets import pattern_of
from surgery.reports.to_json import plain
from surgery.reports.values import Cell, Name, NameList, Phrase, Value

__all__ = ["ExtractClass", "ExtractResult", "ExtractRow", "Layers", "RankChoice", "layers_of"]


@dataclass(frozen=True, slots=True)
class RankChoice:
    """What one rank for some of the layers would cost and leave; dense tensors are stored in any case.

    Attributes:
        rank: Rank of every matrix, or less where the matrix has less.
        layers: ``attention``, ``mlp`` (experts included) or ``all``.
        residual: ``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||`` over the whole model.
        parameters: Number of values in the adapter.
        nbytes: Their size.
    """

    rank: int
    layers: str
    residual: float
    parameters: int
    nbytes: int

    def as_json(self) -> dict[str, Any]:
        """The choice as plain values, for ``--json`` and the manifest."""
        return six_digits(plain(self))


ExtractClass = Literal[
    "low-rank", "dense", "rows", "new rows", "unchanged", "alias", "derivable", "corrected", "dropped"
]


@dataclass(frozen=True, slots=True)
class ExtractRow:
    """One tensor of TUNED.

    Attributes:
        name: TUNED's name for it.
        kind: Its class.
        form: How the adapter holds it: ``LoRA``, ``DoRA``, ``modules_to_save``, ``bias``, ``token rows``, ``resized``;
            empty if it does not.
        shape: TUNED's shape.
        rank: Rank of the factors; 0 if there are none.
        energy: ``||TUNED - BASE||_F^2``.
        share: Share of the energy of all tensors.
        residual: ``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||``, measured on what was written (dry run: computed
            from the spectrum).
        bound: The residual is at most this many times the least that any matrix of that rank leaves.
        moved: Share of values that differ from BASE.
        rms_ulp: Root mean square of the change, in units of TUNED's median spacing.
        noise: Storage rounding expected in the change, relative to its norm.
        parameters: Number of values stored for it.
        nbytes: Their size. Experts that share a pair of factors share its cost evenly.
        signal: Directions above the rounding noise, for factors.
        calibration: Effect of calibration inputs, for factors.
        why: Remark.
    """

    name: str
    kind: ExtractClass
    form: str = ""
    shape: tuple[int, ...] = ()
    rank: int = 0
    energy: float = 0.0
    share: float = 0.0
    residual: float = 0.0
    bound: float = 1.0
    moved: float = 0.0
    rms_ulp: float = 0.0
    noise: float = 0.0
    parameters: int = 0
    nbytes: int = 0
    signal: Signal | None = None
    calibration: CalibrationFacts | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row as plain values, for ``--json`` and the manifest."""
        row: dict[str, Any] = {"class": self.kind, "shape": list(self.shape)}
        if self.form:
            row |= {"form": self.form, "parameters": self.parameters, "nbytes": self.nbytes}
        if self.energy or self.kind in ("low-rank", "dense", "rows", "new rows", "dropped"):
            row |= {
                "energy": self.energy,
                "energy_share": self.share,
                "residual": self.residual,
                "moved": self.moved,
                "rms_ulp": self.rms_ulp,
                "storage_noise": self.noise,
            }
        if self.rank:
            row |= {"rank": self.rank, "bound": self.bound}
        if self.signal is not None:
            row |= self.signal.as_json()
        if self.calibration is not None:
            row["calibration"] = self.calibration.as_json()
        return six_digits(row | ({"why": self.why} if self.why else {}))


@summarised
@dataclass(frozen=True)
class ExtractResult:
    """What an extraction did, or (dry run) would do.

    Attributes:
        output: Folder or file; None for a dry run.
        format: Format of the adapter.
        base_id: Content id of BASE, as recorded in the adapter.
        rows: Every tensor of TUNED, in its order.
        dtype: Stored type of the factors.
        adapter_nbytes: Size of the adapter's tensor file.
        tuned_nbytes: Size of TUNED's weights, which the adapter replaces.
        warnings: Facts that the user should know.
        table: Other ranks and fewer layers; empty if it was not requested.
        survival: Share of all factors' updates that a merge into BASE's stored type keeps; NaN without factors.
        merged: The LoRA that TUNED seems to contain; None if it does not.
        kind: LoRA or DoRA, and why.
        calibration: Effect of calibration inputs; None without any.
        quantised: What rounding to codes has to do with the change; empty if neither side is quantised.
        reproduced: Of a merge whose factors were found beyond its rounding: the shares of TUNED's values that BASE with
            the plain factors, and with those written, rounds to bit for bit.
        timings: Seconds, for ``--json``; never part of a manifest. ``starting``: until the first byte of a tensor was
            asked for; ``reading``: from then until all differences were factorised; then ``kind`` (LoRA or DoRA),
            ``calibrating``, ``identifying`` (the content id), ``noise`` (what a merge would keep), ``settling`` (all
            other decisions), ``writing``, ``syncing`` (configuration and factors to the disk), ``proving``,
            ``committing``; ``first_read_to_synced``: all but ``starting``.
        devices: Where it was computed.
        why_devices: Why there, if that was left open (``auto``).
        seconds: How long it took.
    """

    output: Path | None
    format: str
    base_id: str
    rows: tuple[ExtractRow, ...]
    dtype: str
    adapter_nbytes: int
    tuned_nbytes: int
    warnings: tuple[str, ...] = ()
    table: tuple[RankChoice, ...] = ()
    survival: float = math.nan
    merged: MergedLoRA | None = None
    kind: KindFacts | None = None
    calibration: CalibrationTotals | None = None
    quantised: tuple[str, ...] = ()
    reproduced: tuple[float, float] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    why_devices: str = ""
    seconds: float = elapsed()

    @property
    def energy(self) -> float:
        """``||TUNED - BASE||_F^2`` over all tensors."""
        return Layers("", self.rows).energy

    @property
    def residual(self) -> float:
        """``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||`` over all tensors together."""
        return Layers("", self.rows).residual

    @property
    def moved(self) -> float:
        """Share of all compared values that differ from BASE."""
        return Layers("", tuple(row for row in self.rows if row.kind not in ("alias", "derivable"))).moved

    @property
    def noise(self) -> float:
        """Storage rounding expected in the whole change, relative to its norm."""
        return Layers("", self.rows).noise

    @property
    def lost(self) -> float:
        """Share of the energy in tensors that no form holds."""
        return math.fsum(row.share for row in self.rows if row.kind == "dropped")

    @property
    def parameters(self) -> int:
        """Number of values that the adapter holds."""
        return sum(row.parameters for row in self.rows)

    @property
    def classes(self) -> Mapping[str, int]:
        """Number of tensors per class."""
        return dict(sorted(Counter(row.kind for row in self.rows).items()))

    @property
    def saved(self) -> float:
        """How many times smaller the adapter is than the full copy."""
        return self.tuned_nbytes / self.adapter_nbytes if self.adapter_nbytes else 0.0

    @property
    def nbytes(self) -> int:
        """Size of all files written; 0 for a dry run."""
        return nbytes_of(self.output)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the output, the time and its parts, and what the manifest has."""
        timings = {name: round(value, 3) for name, value in self.timings.items()}
        return (
            written(self.output, self.seconds)
            | {"timings": timings, "devices": list(self.devices)}
            | self.as_manifest()
        )

    def as_manifest(self) -> dict[str, Any]:
        """The record in the manifest: the same for the same inputs and options, without paths and times."""
        facts = {
            "verb": "extract-lora",
            "format": self.format,
            "base": self.base_id,
            "dtype": self.dtype,
            "kind": None if self.kind is None else self.kind.as_json(),
            "calibration": None if self.calibration is None else self.calibration.as_json(),
            "classes": dict(self.classes),
            "residual": self.residual,
            "energy": self.energy,
            "lost": self.lost,
            "moved": self.moved,
            "storage_noise": self.noise,
            "survival": self.survival,
            "looks_like": None if self.merged is None else {"kind": "merged LoRA", **plain(self.merged)},
            "parameters": self.parameters,
            "adapter_nbytes": self.adapter_nbytes,
            "tuned_nbytes": self.tuned_nbytes,
            "tensors": {row.name: row.as_json() for row in self.rows},
            "warnings": list(self.warnings),
        }
        facts |= {"quantised": list(self.quantised)} if self.quantised else {}
        return six_digits(facts | ({"table": [choice.as_json() for choice in self.table]} if self.table else {}))

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """The whole in figures, then like-named layers in one row, or each by itself if `verbose`.

        Args:
            verbose: Each layer.
            output: As asked for; only for the name under which it is shown.
        """
        sections: list[Section] = [Facts((*self._facts(), *self._outcome(output)))]
        changed = [row for row in self.rows if row.energy or row.form]
        if changed:
            layers = layers_of(changed, apart=verbose)
            sections += [Table(_LAYERS, tuple(map(_layer, layers))), *_remarks(layers)]
            if len(layers) < len(changed):
                sections.append(Note("like-named layers are taken together", "omitted"))
        if self.table:
            choices = (
                (choice.rank, choice.layers, choice.residual, choice.parameters, choice.nbytes) for choice in self.table
            )
            sections.append(Table(_CHOICES, tuple(choices)))
        if self.output is None:
            sections.append(DRY_RUN)
        return Summary("Extraction", (*sections, *warning_notes(self.warnings)))

    def _facts(self) -> Iterator[tuple[str, Phrase]]:
        ranks = sorted({row.rank for row in self.rows if row.rank})
        spread = (
            f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
        )
        noise = Value(self.noise, "share", 1)
        yield "tensors", counted(self.classes)
        moved = (
            Value(self.moved, "share", 1),
            " of the values moved; storage rounding makes up ",
            noise,
            " of the change",
        )
        yield "change", moved
        yield "adapter", (f"{spread}, ", Value(self.parameters, "count"), f" parameters, {self.dtype}")
        lost = ("; ", Value(self.lost, "share"), " of its energy was left out") if self.lost else ()
        if self.reproduced is not None:
            plain, refined = (Value(share, "share") for share in self.reproduced)
            yield "reproduced", (refined, " of the merged values bit for bit (plain factors: ", plain, ")")
        yield "held", ("all but ", Value(self.residual, "share"), " of the change", *lost)
        times = f"{self.saved:.3g} times smaller" if self.saved >= 1 else f"{1 / self.saved:.3g} times larger"
        copy = Value(self.tuned_nbytes, "bytes")
        yield "size", (Value(self.adapter_nbytes, "bytes"), f", {times} than the full copy's ", copy)

    def _outcome(self, output: Path | None) -> Iterator[tuple[str, Phrase]]:
        if self.kind is not None:
            yield "kind", f"{'DoRA' if self.kind.kind == 'dora' else 'LoRA'}: {self.kind.why}"
        if self.calibration is not None:
            yield "calibration", self.calibration.text
        if self.merged is not None:
            yield "origin", self.merged.text
        for finding in self.quantised:
            yield "quantised", finding
        if not math.isnan(self.survival):
            survives = Value(self.survival, "share", 1)
            yield "merging", ("keeps ", survives, " of the factors' update in BASE's stored type")
        if self.why_devices:
            yield "computed", f"on {', '.join(self.devices)}: {self.why_devices}"
        if self.output is not None:
            took = (" in ", Value(self.seconds, "seconds")) if self.seconds else ()
            yield "proof", "read back: it holds what was measured against TUNED"
            yield "wrote", (Name(output or self.output, PATH), *took)


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


@dataclass(frozen=True, slots=True)
class Layers:
    """Rows whose names differ only in layer numbers.

    Attributes:
        pattern: ``model.layers.*.mlp.up_proj``.
        rows: The grouped rows; never empty.
    """

    pattern: str
    rows: tuple[ExtractRow, ...]

    @property
    def kind(self) -> str:
        """The class of the rows."""
        return self.rows[0].kind

    @property
    def energy(self) -> float:
        """``||TUNED - BASE||_F^2`` of all rows."""
        return math.fsum(row.energy for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the energy of the model."""
        return math.fsum(row.share for row in self.rows)

    @property
    def residual(self) -> float:
        """The residual of all their changes, relative to its norm."""
        return self._norm([row.residual for row in self.rows])

    @property
    def noise(self) -> float:
        """Storage rounding in their change, relative to its norm."""
        return self._norm([row.noise for row in self.rows])

    @property
    def moved(self) -> float:
        """Share of their values that differ from BASE."""
        sizes = [math.prod(row.shape) for row in self.rows]
        return sum(size * row.moved for size, row in zip(sizes, self.rows, strict=True)) / max(sum(sizes), 1)

    @property
    def rms_ulp(self) -> float:
        """Root mean square of the change in spacings of the stored type, as the mean of the layers."""
        return math.fsum(row.rms_ulp for row in self.rows) / len(self.rows)

    @property
    def ranks(self) -> str:
        """``16``, or ``4-16``."""
        return _spread([row.rank for row in self.rows if row.rank])

    @property
    def signal(self) -> str:
        """Directions that stand out of rounding noise, of how many: ``50/384``, ``33-203/384``, ``>=16/384``."""
        signals = [row.signal for row in self.rows if row.signal is not None]
        if not signals:
            return ""
        least = "" if all(signal.complete for signal in signals) else ">="
        return f"{least}{_spread([signal.count for signal in signals])}/{_spread([signal.of for signal in signals])}"

    @property
    def survival(self) -> float:
        """Share of the factors' update that a merge would keep, weighted by energy; NaN without factors."""
        survivals = [(row.energy, row.signal.survival) for row in self.rows if row.signal is not None]
        survivals = [(energy, value) for energy, value in survivals if not math.isnan(value)]
        total = math.fsum(energy for energy, _ in survivals)
        return math.fsum(energy * value for energy, value in survivals) / total if total > 0 else math.nan

    @property
    def why(self) -> str:
        """Their common remark; if there are several, the first one and the number of others."""
        notes = list(dict.fromkeys(row.why for row in self.rows if row.why))
        return notes[0] + (f" (and {len(notes) - 1} other remarks)" if len(notes) > 1 else "") if notes else ""

    def _norm(self, parts: list[float]) -> float:
        left = math.fsum(row.energy * part**2 for row, part in zip(self.rows, parts, strict=True))
        return math.sqrt(left / self.energy) if self.energy > 0 else 0.0


def layers_of(rows: Iterable[ExtractRow], *, apart: bool = False) -> tuple[Layers, ...]:
    """Group rows by pattern and class, in order of first appearance; `apart` keeps every row by itself."""
    groups: dict[tuple[str, str], list[ExtractRow]] = {}
    for row in rows:
        groups.setdefault((row.name if apart else pattern_of(row.name), row.kind), []).append(row)
    return tuple(Layers(pattern, tuple(members)) for (pattern, _), members in groups.items())


def _spread(numbers: list[int]) -> str:
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
