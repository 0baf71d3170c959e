# SPDX-License-Identifier: Apache-2.0
"""The result of an extraction: every tensor of TUNED in one class, and the totals.

Only records of figures; importing them does not import torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.extraction.figures import ExtractRow, Layers, RankChoice
from surgery.extraction.findings import CalibrationTotals, KindFacts, MergedLoRA, six_digits
from surgery.extraction.recovery import Recovery
from surgery.extraction.spectra import RoleSpectrum
from surgery.reports.output import PATH, counted, nbytes_of, written
from surgery.reports.result import elapsed, summarised
from surgery.reports.selective import SelectiveTuning
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["ExtractResult"]

_STORED = {"low-rank": "as factors", "dense": "in full"}


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
        recovery: How much of TUNED's gain on a text the adapter has; None without a text.
        reproduced: Of a merge whose factors were found beyond its rounding: the shares of TUNED's values that BASE with
            the plain factors, and with those written, rounds to bit for bit.
        tuned: Which part of BASE changed, where that has a name (docs/insert.md); never part of a manifest.
        spectra: Of the change, by role; for pictures, and never part of a manifest.
        timings: Seconds, for ``--json``; never part of a manifest. ``starting``: until the first byte of a tensor was
            asked for; ``reading``: from then until all differences were factorised; then ``kind`` (LoRA or DoRA),
            ``calibrating``, ``identifying`` (the content id), ``noise`` (what a merge would keep), ``settling`` (all
            other decisions), ``evaluating`` (on a text), ``writing``, ``syncing`` (configuration and factors to the disk), ``proving``,
            ``committing``; ``first_read_to_synced``: all but ``starting``.
        devices: Where it was computed.
        why_devices: Why there, if that was left open (``auto``).
        models: What BASE and TUNED are called.
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
    recovery: Recovery | None = None
    reproduced: tuple[float, float] | None = None
    tuned: SelectiveTuning | None = None
    spectra: tuple[RoleSpectrum, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    why_devices: str = ""
    models: tuple[str, str] = ("", "")
    seconds: float = elapsed()

    @property
    def _title(self) -> str:
        base, tuned = self.models
        kind = "DoRA" if self.kind is not None and self.kind.kind == "dora" else "LoRA"
        return f"{tuned} as a {kind} of {base}" if base and tuned else "Extraction"

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
            | ({} if self.tuned is None else {"tuned": self.tuned.as_json()})
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
        facts |= {"recovery": self.recovery.as_json()} if self.recovery is not None else {}
        return six_digits(facts | ({"table": [choice.as_json() for choice in self.table]} if self.table else {}))

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """The whole in figures, then like-named layers in one row, or each by itself if `verbose`.

        Args:
            verbose: Each layer.
            output: As asked for; only for the name under which it is shown.
        """
        from surgery.extraction.extract_summary import extract_summary

        facts = (*_facts(self), *_outcome(self, output))
        return extract_summary(
            self._title,
            facts,
            self.rows,
            self.table,
            self.spectra,
            self.warnings,
            recovery=self.recovery,
            verbose=verbose,
            dry_run=self.output is None,
        )


def _facts(result: ExtractResult) -> Iterator[tuple[str, Phrase]]:
    ranks = sorted({row.rank for row in result.rows if row.rank})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no factors"
    noise = Value(result.noise, "share", 1)
    yield "tensors", counted(result.classes, _STORED)
    moved = (
        Value(result.moved, "share", 1),
        " of the values moved; storage rounding makes up ",
        noise,
        " of the change",
    )
    yield "change", moved
    if result.tuned is not None:
        yield "tuned", result.tuned.phrase
    yield "adapter", (f"{spread}, ", Value(result.parameters, "count"), f" parameters, {result.dtype}")
    lost = ("; ", Value(result.lost, "share"), " of its energy was left out") if result.lost else ()
    if result.reproduced is not None:
        plain, refined = (Value(share, "share") for share in result.reproduced)
        yield "reproduced", (refined, " of the merged values bit for bit (plain factors: ", plain, ")")
    yield "missing", (Value(result.residual, "share"), " of the change (Frobenius norm)", *lost)
    if result.recovery is not None:
        yield "recovered", _recovered(result.recovery)
    times = f"{result.saved:.3g} times smaller" if result.saved >= 1 else f"{1 / result.saved:.3g} times larger"
    copy = Value(result.tuned_nbytes, "bytes")
    yield "size", (Value(result.adapter_nbytes, "bytes"), f", {times} than the full copy's ", copy)


def _recovered(recovery: Recovery) -> Phrase:
    if recovery.recovered is not None:
        return Value(recovery.recovered, "share", 1), " of what TUNED gains on the text"
    return "not defined: TUNED does not predict the text clearly better than BASE"


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
