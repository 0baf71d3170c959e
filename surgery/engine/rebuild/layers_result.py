# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.layers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger
from surgery.reports.result import elapsed, summarised

if TYPE_CHECKING:
    from surgery.reports.summary import Summary
    from surgery.reports.values import Phrase

__all__ = ["AdapterBeside", "LayersResult"]

_LISTED = 8


@dataclass(frozen=True, slots=True)
class AdapterBeside:
    """What became of an adapter that was remapped with its base.

    Attributes:
        output: Where it was written; None for a dry run.
        sites: Number of its changes.
        dropped: Changes of layers that are gone.
        copied: Changes of layers that are there again.
    """

    output: Path | None
    sites: int
    dropped: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "sites": self.sites,
            "dropped": list(self.dropped),
            "copied": list(self.copied),
        }


@summarised
@dataclass(frozen=True)
class LayersResult:
    """What was made of a checkpoint, or (dry run) would be.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor.
        facts: What was done, as the manifest has it.
        parameters: Numbers before, and after.
        adapter: What became of the adapter, if one was given.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    facts: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    adapter: AdapterBeside | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all weight files."""
        return self.ledger.plan.nbytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        plan = self.ledger.plan
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": plan.nbytes,
            "seconds": round(self.seconds, 3),
            "files": {file.name: file.nbytes for file in plan.files},
            "done": dict(self.facts),
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            **({"adapter": self.adapter.as_json()} if self.adapter is not None else {}),
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json(),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """What was done, what became of the tensors, and of the adapter; with `verbose` every tensor."""
        from surgery.reports.output import DRY_RUN, PATH, counted, wrote
        from surgery.reports.sections import Column, Facts, Note, Section, Table
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Name, Value

        plan = self.ledger.plan
        facts: list[tuple[Phrase, Phrase]] = [
            ("layers", Name(plan.roots[0], PATH)),
            *self._done(),
            ("parameters", self._parameters()),
            ("tensors", counted(self.ledger.classes)),
            *self._adapter(),
        ]
        if self.output is None:
            facts.append(("would write", (Value(plan.nbytes, "bytes"), f" of weights in {len(plan.files)} files")))
        else:
            facts.append(("wrote", (Name(self.output, PATH), ": ", *wrote(self.output, self.seconds))))
        sections: list[Section] = [Facts(tuple(facts))]
        if verbose:
            columns = Column("tensor", "name"), Column("class"), Column("shape", "shape"), Column("type")
            rows = tuple((t.label, t.outcome, t.shape, t.dtype.label) for t in plan.tensors)
            sections.append(Table(columns, rows))
        if self.output is None:
            sections.append(DRY_RUN)
        else:
            sections.append(Note(("next: look at it: surgery inspect ", Name(self.output, PATH))))
        return Summary("Layers", (*sections, *warning_notes(self.warnings)))

    def figures(self) -> tuple[tuple[Phrase, Phrase], ...]:
        """What was done, for a model card."""
        return *self._done(), ("parameters", self._parameters())

    def _parameters(self) -> Phrase:
        from surgery.reports.values import Value

        before, after = self.parameters
        return Value(before, "count"), " before, ", Value(after, "count"), " after"

    def _done(self) -> Iterator[tuple[Phrase, Phrase]]:
        from surgery.reports.values import Name

        if (layers := self.facts.get("layers")) is not None:
            order = layers["order"]
            yield "stack", (Name(layers["stack"]), f": {layers['before']} layers become {len(order)}: ", _ranges(order))
        for what in ("split", "fused"):
            if names := self.facts.get(what):
                yield what, ", ".join(names)
        if (rows := self.facts.get("vocabulary")) is not None:
            added = f", {rows['added']} of them the mean of the others" if rows["added"] else ""
            yield "vocabulary", f"{rows['before']} rows become {rows['after']}{added}"

    def _adapter(self) -> Iterator[tuple[Phrase, Phrase]]:
        from surgery.reports.output import PATH
        from surgery.reports.values import Name, NameList

        if (adapter := self.adapter) is None:
            return
        copied = f", {len(adapter.copied)} of them for layers that are there again" if adapter.copied else ""
        kept = f"{adapter.sites} changes kept{copied}" if adapter.sites else "virtual tokens, which no layer changes"
        yield "adapter", kept if adapter.output is None else (Name(adapter.output, PATH), f": {kept}")
        if adapter.dropped:
            yield "", (f"{len(adapter.dropped)} dropped with their layers: ", NameList(adapter.dropped, _LISTED))


def _ranges(order: list[int]) -> str:
    """``0-7, 8-15, 8-15``: runs of numbers."""
    runs: list[list[int]] = []
    for number in order:
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in runs)
