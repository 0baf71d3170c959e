# SPDX-License-Identifier: Apache-2.0
"""The summary of a result, and its renderings.

A result builds it in ``summary()``; `as_text`, `as_markdown`, `as_html`, `as_csv` and `as_json` render it, and another
renderer needs nothing of any result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from surgery.reports.sections import Facts, Note, Section
from surgery.reports.to_json import plain
from surgery.reports.values import phrase_text
from surgery_formats.text import clean, local_name, show

__all__ = ["Summary", "warning_notes"]

_BRIEF = 200  # characters of a result's repr
_SUBJECT, _SUBJECTS = 60, 4  # characters of a name in a heading, and names


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """A result as people see it, before it is rendered.

    Attributes:
        title: Of the whole.
        sections: In order; warnings come last.
        command: The command whose result it is, where one was given.
        subjects: What it was given, by the names that a page may tell.
    """

    title: str
    sections: tuple[Section, ...]
    command: str = ""
    subjects: tuple[str, ...] = ()

    def asked(self, command: str, subjects: Iterable[str]) -> Summary:
        """A copy that says what it is an answer to: the name of a page that is kept.

        Args:
            command: Such as ``diff``.
            subjects: What the command was given, such as two models. Of paths of a machine the last part is kept.
        """
        names = (local_name(subject) for subject in subjects)
        return replace(self, command=command, subjects=tuple(name.rstrip("/\\") or name for name in names))

    @property
    def heading(self) -> str:
        """The title with the subjects that it does not name."""
        told = {self.title, *self.title.split()}
        shown = [show(name, _SUBJECT) for name in dict.fromkeys(self.subjects) if PurePath(name).name not in told]
        more = [f"and {len(shown) - _SUBJECTS} more"] if len(shown) > _SUBJECTS else []
        named = ", ".join(shown[:_SUBJECTS] + more)
        return f"{self.title}: {named}" if named else self.title

    @property
    def data(self) -> tuple[Section, ...]:
        """All sections but notes."""
        return tuple(section for section in self.sections if not isinstance(section, Note))

    @property
    def notes(self) -> tuple[Note, ...]:
        """All notes, warnings included."""
        return tuple(section for section in self.sections if isinstance(section, Note))

    @property
    def warnings(self) -> tuple[Note, ...]:
        """Notes that are warnings."""
        return tuple(note for note in self.notes if note.level == "warning")

    def plus(self, *sections: Section) -> Summary:
        """A copy with `sections` added at the end."""
        return replace(self, sections=(*self.sections, *sections))

    def as_text(self, width: int | None = None) -> str:
        """Plain text, fitted to `width` columns if given."""
        from surgery.reports.text import as_text

        return as_text(self.sections, width)

    def as_markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        from surgery.reports.markdown import as_markdown

        return as_markdown(self.title, self.sections)

    def as_html(self) -> str:
        """A page of its own: one file with pictures and tables that loads nothing, the same bytes for the same summary."""
        from surgery.reports.html.page import as_page

        return as_page(self.heading, self.sections, self.command)

    def as_csv(self) -> str:
        """The tables, one below the other, with their numbers in full."""
        from surgery.reports.csv_tables import as_csv

        return as_csv(self.sections)

    def as_json(self) -> dict[str, Any]:
        """Plain values. Numbers stay numbers, beside the types that tell how to write them."""
        sections = [{"section": type(section).__name__.lower(), **plain(section)} for section in self.sections]
        return {"title": self.title, "sections": sections}

    def brief(self) -> str:
        """The facts on one line, cut to a fixed length."""
        facts = (row for section in self.sections if isinstance(section, Facts) for row in section.rows)
        line = "; ".join(f"{phrase_text(label)}: {phrase_text(text)}" for label, text in facts) or clean(self.title)
        return line if len(line) <= _BRIEF else f"{line[: _BRIEF - 3]}..."

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        return f"<Summary {clean(self.title)}: {self.brief()}>"

    def _repr_markdown_(self) -> str:
        return self.as_markdown()

    def _repr_html_(self) -> str:
        from surgery.reports.html.page import as_fragment

        return as_fragment(self.heading, self.sections)


def warning_notes(texts: tuple[str, ...]) -> tuple[Note, ...]:
    """The warnings of a result as notes."""
    return tuple(Note(text, "warning") for text in texts)
