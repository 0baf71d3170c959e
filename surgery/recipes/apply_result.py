# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.apply`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.reports.result import Result, elapsed, summarised

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["ApplyResult", "Done", "Place"]

Place = Literal["memory", "temporary", "output", "folded", "check"]
"""Where the result of a step is: a plan in memory, a temporary folder, where the user wants it; folded into the step that uses
it; or nowhere, of a verb that only looks."""

_SAID = {
    "memory": "not written: its user takes it from memory",
    "temporary": "written to a temporary folder",
    "folded": "not written: done by the step that uses it",
    "check": "looks only",
}


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a step.

    Attributes:
        number: Of the step.
        verb: What it does.
        name: Of its result, or empty.
        place: Where that is.
        output: The path, for an output.
        result: What the verb returned; None for a dry run, and for what is not written.
        kept: Whether it was not done, because a run that was killed had finished it; `result` is None then.
    """

    number: int
    verb: str
    name: str
    place: Place
    output: Path | None = None
    result: Result | None = None
    kept: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "step": self.number,
            "verb": self.verb,
            "as": self.name,
            "place": self.place,
            "output": None if self.output is None else str(self.output),
            "kept": self.kept,
            "result": None if self.result is None else self.result.as_json(),
        }


@summarised
@dataclass(frozen=True)
class ApplyResult:
    """What a recipe did, or (dry run) would do.

    Attributes:
        output: What the last step wrote; None for a dry run, or if it only looked.
        steps: Every step.
        same: Of a manifest: whether every file is again what it was; None for a recipe, and for a dry run.
        warnings: Of all steps, and what the user should know besides.
        seconds: How long it took.
    """

    output: Path | None
    steps: tuple[Done, ...]
    same: bool | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Size of all that was written to outputs."""
        return sum(step.result.nbytes for step in self.steps if step.result is not None and step.place == "output")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "same": self.same,
            "steps": [step.as_json() for step in self.steps],
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """The steps and where their results are; with `verbose` what each of them says."""
        from surgery.reports.output import DRY_RUN, PATH
        from surgery.reports.sections import Column, Facts, Section, Table
        from surgery.reports.summary import Summary, warning_notes
        from surgery.reports.values import Name

        columns = Column("step", "integer"), Column("verb"), Column("as", "name"), Column("result")
        rows = tuple(
            (
                done.number,
                done.verb,
                done.name or None,
                _SAID.get(done.place) or (Name(done.output, PATH) if done.output is not None else "an output"),
            )
            for done in self.steps
        )
        sections: list[Section] = [Table(columns, rows, "Steps")]
        if self.same is not None:
            said = "every file is what it was" if self.same else "some files are not what they were"
            sections.append(Facts((("again", said),)))
        if kept := [str(done.number) for done in self.steps if done.kept]:
            sections.append(Facts((("kept", f"what a run that was killed had finished: steps {', '.join(kept)}"),)))
        for done in self.steps if verbose else ():
            if done.result is not None:
                sections.append(Facts((("step", f"{done.number}, {done.verb}"),)))
                sections += done.result.summary().data
        if all(done.result is None and not done.kept for done in self.steps):
            sections.append(DRY_RUN)
        return Summary("Recipe", (*sections, *warning_notes(self.warnings)))
