# SPDX-License-Identifier: Apache-2.0
"""Plain text: aligned facts, and tables fitted to a width."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table, Verbatim
from surgery.reports.values import cell_text, phrase_text
from surgery_formats.text import clean, verbatim

__all__ = ["as_text", "section_lines", "together"]

_GAP = 2  # between columns
_JOINTS = "./_-:,"  # behind which a name may go on in the next line
_PART = re.compile(rf"[^ {re.escape(_JOINTS)}]*[{re.escape(_JOINTS)}]|[^ {re.escape(_JOINTS)}]+")
_LEAST = 8  # characters that a column of words is never narrower than

Style = Callable[[str], str]


def as_text(sections: Iterable[Section], width: int | None = None) -> str:
    """Render sections with blank lines between them; consecutive notes, and sentences of charts, stay together."""
    lines: list[str] = []
    previous: Section | None = None
    for section in sections:
        if previous is not None and not together(previous, section):
            lines.append("")
        lines += section_lines(section, width)
        previous = section
    return "\n".join(lines)


def together(previous: Section, section: Section) -> bool:
    """Whether no blank line parts the two."""
    return any(_is_line(previous, kind) and _is_line(section, kind) for kind in (Note, Chart))


def _is_line(section: Section, kind: type[Note | Chart]) -> bool:
    return isinstance(section, kind) and not (isinstance(section, Chart) and not section.says)


def section_lines(section: Section, width: int | None = None, strong: Style = str) -> list[str]:
    """Render a section for a terminal of `width` columns, None to fold nothing; `strong` styles labels and headings."""
    match section:
        case Facts(rows):
            labels = [phrase_text(label) for label, _ in rows]
            widest = max(map(cells, labels), default=0)
            texts = (phrase_text(text) for _, text in rows)
            return [f"{strong(_padded(label, widest))}  {text}" for label, text in zip(labels, texts, strict=True)]
        case Table():
            return _table(section, width, strong)
        case Chart(title, table, _, says):
            return _sentence(f"{clean(title)}: {phrase_text(says)}", width) if says else _table(table, width, strong)
        case Note(text, level):
            return _sentence(f"{'warning: ' if level == 'warning' else ''}{phrase_text(text)}", width)
        case Verbatim(text):
            return verbatim(text).split("\n")


def _sentence(text: str, width: int | None) -> list[str]:
    """A sentence on lines of `width` columns; a word that is longer than a line stays whole."""
    if width is None or cells(text) <= width:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def cells(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_cells(char) for char in text)


def _cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _table(table: Table, width: int | None, strong: Style) -> list[str]:
    texts = [[_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    shown = [index for index in range(len(table.columns)) if not texts or any(row[index] for row in texts)]
    widths = {
        index: max(cells(text) for text in (table.columns[index].heading, *(row[index] for row in texts)))
        for index in shown
    }
    if width is not None:
        words = {index: max((_longest_word(row[index]) for row in texts), default=0) for index in shown}
        _fit(table.columns, widths, words, width)
    columns = [table.columns[index] for index in widths]
    sizes = list(widths.values())
    lines = _row([column.heading for column in columns], columns, sizes, strong)
    for row in texts:
        lines += _row([row[index] for index in widths], columns, sizes, str)
    return lines


def _cell(cell: object, column: Column) -> str:
    """The text of a cell. Leading spaces are our indentation; the rest may be untrusted."""
    if isinstance(cell, str):
        bare = cell.lstrip(" ")
        return cell[: len(cell) - len(bare)] + cell_text(bare, column.type, column.digits)
    return cell_text(cell, column.type, column.digits)


def _fit(columns: Sequence[Column], widths: dict[int, int], words: Mapping[int, int], width: int) -> None:
    """Make `widths` fit: drop spare columns first, then narrow the widest columns of words, at first down to their `words`."""

    def excess() -> int:
        return sum(widths.values()) + _GAP * (len(widths) - 1) - width

    for index in sorted((index for index in widths if columns[index].spare), key=lambda index: -columns[index].spare):
        if excess() > 0:
            del widths[index]
    foldable = [index for index in widths if not columns[index].numeric or columns[index].type == "spread"]
    for least in ({index: max(_LEAST, words[index]) for index in foldable}, dict.fromkeys(foldable, _LEAST)):
        while excess() > 0 and (wide := [index for index in foldable if widths[index] > least[index]]):
            widths[max(wide, key=lambda index: widths[index])] -= 1


def _longest_word(text: str) -> int:
    """Columns of the longest part that is not broken where there is room: names are, behind what joins their parts."""
    return max(map(cells, _PART.findall(text)), default=0)


def _row(texts: Sequence[str], columns: Sequence[Column], widths: Sequence[int], style: Style) -> list[str]:
    folded = [_folded(text, size) for text, size in zip(texts, widths, strict=True)]
    lines = []
    for parts in zip_longest(*folded, fillvalue=""):
        padded = (
            _padded(part, size, right=column.numeric) for part, size, column in zip(parts, widths, columns, strict=True)
        )
        lines.append(style((" " * _GAP).join(padded).rstrip()))
    return lines


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cells(text))
    return space + text if right else text + space


def _folded(text: str, width: int) -> list[str]:
    """Split `text` into lines of at most `width` columns, between words where possible."""
    lines = []
    while cells(text) > width:
        end, used = 0, 0
        while used + _cells(text[end]) <= width or not end:
            used += _cells(text[end])
            end += 1
        space = text.rfind(" ", 1, end + 1)
        if space > 0 and text[:space].strip():
            lines.append(text[:space])
            text = text[space + 1 :]
            continue
        joint = max((match.end() for match in _PART.finditer(text[:end]) if match[0][-1:] in _JOINTS), default=end)
        lines.append(text[:joint])
        text = text[joint:]
    return [*lines, text]
