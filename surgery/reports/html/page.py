# SPDX-License-Identifier: Apache-2.0
"""A summary as one HTML file that asks nothing of any network, or as a fragment for a notebook.

Text is escaped by the templates alone: what is given to them is raw text, but for `Markup` that `_HTML` made of it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from surgery._version import __version__
from surgery.reports.html.draw import draw
from surgery.reports.html.picture import WIDTH, Picture
from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table, Verbatim
from surgery.reports.values import Cell, Notation, Phrase, cell_text, phrase_text
from surgery_formats.text import clean, verbatim

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["as_fragment", "as_page"]

_PAGE, _FRAGMENT = 2000, 40
"""Most rows of a table; what more there are is in CSV and JSON."""
_TEXT = 100_000  # characters of verbatim text
_OPEN, _LONG = 18, 600
"""Cells of a table below a picture, and of one by itself, that need not be folded."""
_WITH_V, _VERBOSE = "a page written with -v has all", "summary(verbose=True) has all"
"""How to have what a page, and what a part of one in a notebook, leaves out."""
_INDENT = "\N{EM SPACE}"


def _name(text: str) -> str:
    return Markup("<code>{}</code>").format(text) if text else ""


def _words(text: str) -> str:
    return escape(clean(text))


_HTML = Notation(_name, _words)


@dataclass(frozen=True, slots=True)
class _Heading:
    text: str
    numeric: bool
    says: str = ""


@dataclass(frozen=True, slots=True)
class _Grid:
    """A table whose cells are written; `more` rows are left out."""

    caption: str
    headings: tuple[_Heading, ...]
    rows: tuple[tuple[Markup, ...], ...]
    more: int
    folded: bool


@dataclass(frozen=True, slots=True)
class _Figure:
    """A chart: its pictures, and the numbers that they were drawn from."""

    title: str
    says: Markup
    pictures: tuple[Picture, ...]
    grid: _Grid


def as_page(title: str, sections: Sequence[Section], command: str = "") -> str:
    """A whole page, the same bytes for the same summary: it has no date."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = _environment().get_template("page.html.jinja")
    return page.render(
        title=title, policy=policy, style=Markup(style), blocks=_blocks(title, sections, _PAGE, _WITH_V),
        width=WIDTH,         version=__version__, command=command,
    )  # fmt: skip


def as_fragment(title: str, sections: Sequence[Section]) -> str:
    """A part of a page, of bounded size."""
    fragment = _environment().get_template("fragment.html.jinja")
    blocks = _blocks(title, sections, _FRAGMENT, _VERBOSE)
    return fragment.render(title=title, style=Markup(_style()), blocks=blocks, width=WIDTH)


def _blocks(title: str, sections: Iterable[Section], most: int, whole: str) -> list[dict[str, Any]]:
    """What the templates show. Charts in a row are one block, which may have several columns."""
    blocks: list[dict[str, Any]] = []
    notes = 0
    for section in sections:
        match section:
            case Facts(rows):
                blocks.append({"kind": "facts", "facts": list(_facts(rows[:most])), "more": max(len(rows) - most, 0)})
            case Table():
                blocks.append({"kind": "table", "grid": _grid(section, title, most, opened=_LONG)})
            case Chart(name, table, _, says):
                grid = _grid(table, name, most, opened=_OPEN)
                figure = _Figure(name, Markup(phrase_text(says, _HTML)), draw(section), grid)
                if not (blocks and blocks[-1]["kind"] == "charts"):
                    blocks.append({"kind": "charts", "figures": []})
                blocks[-1]["figures"].append(figure)
            case Note(text, level):
                notes += 1
                if notes <= most:
                    more = f"; {whole}" if level == "omitted" else ""
                    blocks.append({"kind": "note", "level": level, "text": Markup(phrase_text(text, _HTML) + more)})
            case Verbatim(text):
                blocks.append({"kind": "verbatim", "text": escape(verbatim(text[:_TEXT]))})
    return blocks


def _facts(rows: Iterable[tuple[Phrase, Phrase]]) -> Iterator[tuple[Markup, list[Markup]]]:
    """Labels with what is said of each; a row without a label goes on with the one before."""
    label, said = Markup(""), list[Markup]()
    for raw, text in rows:
        name = Markup(phrase_text(raw, _HTML))
        if name and said:
            yield label, said
            said = []
        label = name or label
        said.append(Markup(phrase_text(text, _HTML)))
    if said:
        yield label, said


def _grid(table: Table, title: str, most: int, *, opened: int) -> _Grid:
    rows = [
        tuple(_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)) for row in table.rows[:most]
    ]
    shown = [index for index in range(len(table.columns)) if not rows or any(row[index] for row in rows)]
    columns = [table.columns[index] for index in shown]
    headings = tuple(_Heading(column.heading, column.numeric, column.says) for column in columns)
    caption = table.caption or f"{title}: {', '.join(heading.text for heading in headings[:4])}"
    cells = tuple(tuple(row[index] for index in shown) for row in rows)
    return _Grid(caption, headings, cells, len(table.rows) - len(rows), len(rows) * len(headings) > opened)


def _cell(cell: Cell, column: Column) -> Markup:
    indent = ""
    if isinstance(cell, str):
        indent = _INDENT * ((len(cell) - len(cell.lstrip(" "))) // 2)
        cell = cell.lstrip(" ")
    return Markup(indent + cell_text(cell, column.type, column.digits, _HTML))


@cache
def _style() -> str:
    return _file("style.css")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    """Templates of this folder, which clean and escape whatever is not `Markup`."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_file), autoescape=True, finalize=_cleaned, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def _cleaned(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
