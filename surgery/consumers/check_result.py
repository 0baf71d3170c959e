# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.check`: what each consumer makes of an adapter."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from surgery.consumers.consumer import Consumer, SourceRead
from surgery.consumers.verdict import FORMAT, OUTCOMES, Outcome, Remedy, Verdict, worst
from surgery.engine.convert_result import ConvertResult
from surgery.reports.drawings import Bars
from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.targets import pattern_of
from surgery.reports.to_json import plain
from surgery.reports.values import Cell, Name, Phrase, Value

__all__ = ["CheckResult", "ConsumerCheck"]

_LISTED = 20  # rows shown of one consumer, unless all are asked for
_REMEDIES: dict[Remedy, str] = {
    "": "merge it into the base",
    "rewrite": "write it anew",
    "scale": "multiply the scale into B",
    "pad": "one rank for all",
    "partners": "zeros beside it",
    "cut": "cut it by its error, or start the program with more",
    "dialect": "its dialect of experts",
    "lora": "a LoRA of it",
    "saved": "a LoRA of it, or leave it out",
    "drop": "leave it out, or merge it into the base",
}
_OF_PROMPTS = "bake it (surgery prompt bake)"  # no merge takes virtual tokens


@dataclass(frozen=True, slots=True)
class ConsumerCheck:
    """What one consumer makes of an adapter.

    Attributes:
        name: Of the consumer.
        title: One line.
        version: That was asked for.
        read: The newest version that the rules were read from.
        sources: Where they were read.
        verdicts: One for each part.
    """

    name: str
    title: str
    version: str
    read: str
    sources: tuple[SourceRead, ...]
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(cls, consumer: Consumer, version: str, verdicts: tuple[Verdict, ...]) -> ConsumerCheck:
        """With what the consumer says of itself."""
        return cls(consumer.name, consumer.title, version, consumer.version, consumer.sources, verdicts)

    @property
    def outcome(self) -> Outcome:
        """Of the whole: the worst."""
        return worst(verdict.outcome for verdict in self.verdicts)

    @property
    def honoured(self) -> bool:
        """Whether every part acts as it was trained."""
        return self.outcome == "honoured"

    @property
    def of_format(self) -> bool:
        """Whether it does not look at the parts, for the format is not its own."""
        return any(verdict.what == FORMAT for verdict in self.verdicts)

    @property
    def faults(self) -> tuple[Verdict, ...]:
        """All but what is honoured, the worst first."""
        wrong = [verdict for verdict in self.verdicts if verdict.outcome != "honoured"]
        return tuple(sorted(wrong, key=lambda verdict: -OUTCOMES.index(verdict.outcome)))


@summarised
@dataclass(frozen=True)
class CheckResult:
    """What consumers make of an adapter.

    Attributes:
        adapter: Its path.
        base: The model it was checked with.
        format: Of the adapter.
        consumers: One record for each consumer that was asked about.
        one: Whether one was asked about, rather than all.
        fixed: The adapter as it was rewritten for that one; None unless it was asked for.
        warnings: What the user should know.
        seconds: How long it took.
    """

    adapter: Path
    base: Path
    format: str
    consumers: tuple[ConsumerCheck, ...]
    one: bool
    fixed: ConvertResult | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # only headers were read

    @property
    def honoured(self) -> bool:
        """Whether each of these consumers honours all of it, or what was written for it."""
        return self.fixed is not None or all(check.honoured for check in self.consumers)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "check",
            "adapter": str(self.adapter),
            "base": str(self.base),
            "format": self.format,
            "honoured": self.honoured,
            "consumers": [plain(check) | {"outcome": check.outcome} for check in self.consumers],
            "fixed": None if self.fixed is None else self.fixed.as_json(),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """A line for each consumer; for one alone, its parts."""
        facts: list[tuple[Phrase, Phrase]] = [
            ("adapter", (Name(self.adapter, PATH), " (", Name(self.format), ")")),
            ("base", Name(self.base, PATH)),
        ]
        sections: list[Section] = []
        if self.one:
            (check,) = self.consumers
            facts += _facts_of_one(check)
            sections += _parts(check, verbose)
        else:
            columns = (Column("consumer"), Column("version"), Column("verdict"), Column("parts"), Column("why"))
            rows = tuple(_line(check) for check in self.consumers)
            sections += [Table(columns, rows, "What programs make of the adapter"), _chart(self.consumers)]
        if self.fixed is not None:
            facts.append(("written", f"honoured by {self.consumers[0].title}, by the same rules"))
            fixed = self.fixed.summary(verbose=verbose)
            sections += fixed.data
            sections += [note for note in fixed.notes if note.level != "warning"]
        sections += self._next()
        return Summary("Check", (Facts(tuple(facts)), *sections, *warning_notes(self.warnings)))

    def _next(self) -> list[Section]:
        """The command that says more of the first program that does not honour all of it, or writes the adapter anew for it."""
        wrong = next((check.name for check in self.consumers if not check.honoured), None)
        if wrong is None or self.fixed is not None:
            return []
        both = f"{shlex.quote(str(self.base))} {shlex.quote(str(self.adapter))}"
        if self.one and not any(fault.remedy for fault in self.consumers[0].faults):
            if any(fault.what == "virtual tokens" for fault in self.consumers[0].faults):
                return []
            return [
                Note(("next: ", Name(f"surgery merge {both} -o OUT", 2 * PATH), " makes a model that needs no adapter"))
            ]
        command = f"surgery check {both} --for {wrong}"
        then = " --fix OUT writes what it honours" if self.one else " shows what is wrong, and the remedy"
        return [Note(("next: ", Name(command, 2 * PATH), then))]

    def plus(self, fixed: ConvertResult) -> CheckResult:
        """With what was written."""
        return replace(self, fixed=fixed)


def _facts_of_one(check: ConsumerCheck) -> list[tuple[Phrase, Phrase]]:
    read: Phrase = f"{check.title} {check.version}"
    files: dict[str, dict[str, None]] = {}  # a file may have several rules
    for source in check.sources:
        files.setdefault(f"{source.program} {source.version}", {})[source.file] = None
    return [
        ("for", read),
        ("verdict", f"{check.outcome}: {'all of it' if check.of_format else _counted(check.verdicts)}"),
        ("rules from", "; ".join(f"{of}: {', '.join(names)}" for of, names in files.items())),
    ]


def _counted(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def _line(check: ConsumerCheck) -> tuple[object, ...]:
    """One consumer of many."""
    faults = check.faults
    why: Phrase = (faults[0].what, ": ", faults[0].why) if faults else ""
    return (
        check.title,
        check.version,
        check.outcome,
        "all refused" if check.of_format else _counted(check.verdicts),
        why,
    )


def _chart(checks: Sequence[ConsumerCheck]) -> Chart:
    """Parts by what becomes of them, a bar for each program."""
    columns = Column("consumer"), *(Column(outcome, "integer") for outcome in OUTCOMES)
    counts = [Counter(verdict.outcome for verdict in check.verdicts) for check in checks]
    most = max(count.total() for count in counts)
    for check, count in zip(checks, counts, strict=True):
        if check.of_format:
            count["refused"] = most
    rows = tuple(
        (check.title, *(count[name] for name in OUTCOMES)) for check, count in zip(checks, counts, strict=True)
    )
    whole = sum(check.honoured for check in checks)
    drawing = Bars(0, tuple(range(1, len(columns))), stacked=True)
    return Chart(
        "Parts by verdict", Table(columns, rows), drawing, f"{whole} of {len(checks)} programs honour all of it"
    )


def _parts(check: ConsumerCheck, verbose: bool) -> list[Section]:
    """Parts of one consumer: those at fault, those alike in one row, or all."""
    said = (Column("what"), Column("verdict"), Column("why"), Column("remedy"))
    if verbose:
        rows = tuple((one.part, *_said(one)) for one in check.verdicts)
        return [Table((Column("part", "name"), *said), rows, "Parts")] if rows else []
    alike: dict[tuple[str, Verdict], list[str]] = {}
    for one in check.faults:
        alike.setdefault((pattern_of(one.part), replace(one, part="", needs="")), []).append(one.part)
    if not alike:
        return []
    rows = tuple((like if parts[1:] else parts[0], len(parts), *_said(one)) for (like, one), parts in alike.items())
    more = len(rows) - _LISTED
    table = Table(
        (Column("parts like", "name"), Column("times", "integer"), *said), rows[:_LISTED], "Parts that are not honoured"
    )
    return [table, *([Note(f"... and {more} more", "omitted")] if more > 0 else [])]


def _said(one: Verdict) -> tuple[Cell, ...]:
    return one.what, _outcome(one), one.why, _remedy(one)


def _outcome(verdict: Verdict) -> Phrase:
    if verdict.factor is None:
        return verdict.outcome
    return verdict.outcome, ", times ", Value(verdict.factor, "number", 3)


def _remedy(verdict: Verdict) -> str:
    if verdict.what == "virtual tokens" and not verdict.remedy:
        return "" if verdict.outcome == "honoured" else _OF_PROMPTS
    return "" if verdict.outcome == "honoured" else _REMEDIES[verdict.remedy]
