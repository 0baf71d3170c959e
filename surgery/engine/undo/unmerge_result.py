# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.unmerge`, where it gives a base back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger
from surgery.engine.plan import is_coded
from surgery.engine.undo.belongs import Evidence
from surgery.reports.result import elapsed, summarised
from surgery_formats.text import listing

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["OfCodes", "UnmergeResult"]

_WORST = 5


@dataclass(frozen=True, slots=True)
class OfCodes:
    """Weights that a merge stored as elements, and whose values had been those of codes.

    Attributes:
        kinds: Their format, by label.
        as_trained: Whether the codes were not the base's, but took the place of its values.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    as_trained: bool = False

    @property
    def said(self) -> str:
        """``42 weights of NF4``; empty without any."""
        counts = Counter(self.kinds.values())
        return listing((f"{number} weights of {kind}" for kind, number in sorted(counts.items())))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not the base here."""
        if self.as_trained:
            return (
                "this is not the release: the merge took the values that the adapter was trained on in its place"
                + (f" ({self.said}), and these come back in elements" if self.said else ""),
            )
        if self.said:
            return (
                f"the merge dequantised {self.said}: their codes and scales are lost without base.rounding, and these are "
                "estimates of what they stood for: compare with the dequantised base",
            )
        return ()


@summarised
@dataclass(frozen=True)
class UnmergeResult:
    """What an unmerge gave back.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor.
        base_id: Content id of the base, proved; empty for an estimate.
        exact: Of an estimate, by weight of elements: the share of values expected to be the base's bit for bit.
        evidence: Of an estimate: how it is known that the adapters were merged; None with what the merge kept.
        same_files: Of an estimate, whether its weight files are the base's, by name, as far as a manifest tells.
        warnings: What the user should know.
        of_codes: Of an estimate: weights whose values were those of codes, as far as a manifest tells.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    base_id: str = ""
    exact: Mapping[str, float] = field(default_factory=dict)
    evidence: Evidence | None = None
    same_files: Mapping[str, bool] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    of_codes: OfCodes = OfCodes()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all weight files."""
        return self.ledger.plan.nbytes

    @property
    def _is_base(self) -> bool:
        return self.evidence is None or (bool(self.same_files) and all(self.same_files.values()))

    @property
    def estimated_codes(self) -> tuple[str, ...]:
        """Of an estimate: weights stored as codes, of which nothing tells how many are the base's."""
        computed = () if self._is_base else self.ledger.plan.computed()
        return tuple(dict.fromkeys(tensor.weight_label for tensor in computed if is_coded(tensor.step)))

    @property
    def exact_share(self) -> float:
        """Share of all stored bytes that are the base's bit for bit: 1 if that is proved, else as expected, without codes.

        Where the merge dequantised, the base is meant with its values rounded to the type that they are stored in here.
        """
        codes = set(self.estimated_codes)
        sizes = {tensor.weight_label: tensor.nbytes for tensor in self.ledger.plan.weights}
        left = sum(sizes.get(label, 0) * (1 - share) for label, share in self.exact.items())
        left += sum(nbytes for label, nbytes in sizes.items() if label in codes)
        return 1.0 if self._is_base else 1 - left / max(sum(sizes.values()), 1)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plan = self.ledger.plan
        evidence = self.evidence
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": plan.nbytes,
            "seconds": round(self.seconds, 3),
            "base_id": self.base_id or None,
            "exact_share": round(self.exact_share, 9),
            "estimated_codes": list(self.estimated_codes),
            "exact": {label: round(share, 6) for label, share in sorted(self.exact.items())},
            "evidence": evidence and {"source": evidence.source, "share": evidence.share, "noise": evidence.noise},
            "same_files": dict(self.same_files),
            "classes": self.ledger.classes,
            "dequantised": dict(self.of_codes.kinds),
            "as_trained": self.of_codes.as_trained,
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """What came back, and how far it is the base; of every weight if `verbose`."""
        from surgery.reports.output import DRY_RUN, PATH, counted
        from surgery.reports.sections import Column, Facts, Section, Table
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Name, Phrase, Value

        base, *adapters = self.ledger.plan.roots
        facts: list[tuple[str, Phrase]] = [
            ("take", Name(", ".join(map(str, adapters)), PATH)),
            ("out of", Name(base, PATH)),
            ("tensors", counted(self.ledger.classes)),
        ]
        if self.base_id:
            facts.append(("base", f"bit for bit, content id {self.base_id[:16]}..."))
        elif codes := self.estimated_codes:
            facts.append(("base", f"the nearest codes in {len(codes)} weights: how many are the base's is not known"))
        elif self.exact:
            of = " of all values are expected to be exact"
            if self.of_codes.kinds:
                of = f" of all values are expected to be exact, of codes ({self.of_codes.said}) as they round to elements"
            facts.append(("base", (Value(self.exact_share, "share"), of)))
        if self.evidence is not None:
            shown = f"the weights: {self.evidence.share:.3f} of the update is there (+- {self.evidence.noise:.3f})"
            facts.append(
                ("merged there", "so says " + ("its manifest" if self.evidence.source == "manifest" else shown))
            )
        if self.same_files:
            same = sum(self.same_files.values())
            near = "" if same == len(self.same_files) else "; the rest is near it, as an estimate is"
            told = f"{same} of {len(self.same_files)} are the base's byte for byte, by the hashes in the manifest{near}"
            facts.append(("weight files", told))
        if self.output is not None:
            facts.append(("wrote", (Name(self.output, PATH), ": ", Value(self.nbytes, "bytes"), " of weights")))
        sections: list[Section] = [Facts(tuple(facts))]
        if self.exact:
            rows = sorted(self.exact.items(), key=lambda row: (row[1], row[0]))
            columns = Column("weight", "name"), Column("expected exact", "share")
            sections.append(Table(columns, tuple(rows if verbose else rows[:_WORST])))
        if self.output is None:
            sections.append(DRY_RUN)
        return Summary("Unmerge", (*sections, *warning_notes(self.warnings)))
