# SPDX-License-Identifier: Apache-2.0
"""The page of every pair of formats, made of the outcomes that the tests compare it with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from tests.support.adapter_files import GOLDEN
from tests.support.matrix import RANK, Outcome, Pair
from tests.support.matrix_rows import COLUMNS, ROWS, Column, Row

__all__ = ["PAGE", "line_of", "page", "reasons_in"]

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
FORMATS = tuple(column for column in COLUMNS if not column.dialect)
DIALECTS = tuple(column for column in COLUMNS if column.dialect)
HEAD = f"""# Every format in every other

Made by `python tools/matrix_page.py`, which converts every golden adapter (`tests/golden`) to every format with `surgery convert`. What
is written is read back and merged into the base of the source, and every weight is compared with what the source makes of it.
`pytest tests/adapters/test_matrix.py` does the same with one adapter of each format that is read, with `-m slow` with all of them.

- **exact**: the same factors, under other names, transposed, or in another order of rows.
- **folded**: the same change of the weight, by other factors: a scale multiplied in, a rank padded, experts stacked.
- **a share**: the certified error of what can only be approximated, `||delta - written|| / ||delta||` of the worst weight:
  codes of `compact`, or LoRAs of rank {RANK} (`--as lora --rank {RANK}`) in place of another kind.
- **a number**: impossible, for [that reason](#reasons). What a format cannot hold is an error that names it; `--allow-loss` leaves it out.

An `l` behind an outcome says that it takes `--as lora`, a `p` that it takes a file for each part of a pipeline (`--component`).
"""
_SHARES = re.compile(r"^(\d+)\. (.+)$", re.MULTILINE)


def reasons_in(text: str) -> dict[str, int]:
    """The numbers of the reasons that a page gives."""
    return {reason: int(number) for number, reason in _SHARES.findall(text)}


def page(pairs: Sequence[Pair], version: str) -> str:
    """The document.

    Args:
        pairs: Of all adapters.
        version: Of the program.
    """
    counted = Counter(pair.outcome.why for pair in pairs if pair.outcome.word == "impossible")
    reasons = {why: number + 1 for number, why in enumerate(sorted(counted, key=lambda why: (-counted[why], why)))}
    words = Counter(pair.outcome.word for pair in pairs)
    written = [one for one in FORMATS if any(p.column == one and p.outcome.word != "impossible" for p in pairs)]
    sources = {pair.source.name for pair in pairs}
    examples = [pair for pair in pairs if pair.source.name in (pair.source.row.example, pair.source.row.title)]
    lines = [
        HEAD,
        f"surgery {version}: {len(ROWS)} formats read (a program's spelling, or a dialect, is one), {len(written)} written beside "
        f"{len(DIALECTS)} dialects of experts; {len(sources)} adapters, {len(pairs)} conversions: {words['exact']} exact, "
        f"{words['folded']} folded, {words['approximated']} approximated, {words['impossible']} impossible. None is wrong.\n",
        "## Formats\n",
        "One adapter of each format that is read: a LoRA, wherever the format has one.\n",
        *_table("read", FORMATS, [(one.title, _of(examples, row=one)) for one in ROWS], reasons),
        "",
        "## Dialects of experts\n",
        "Adapters of mixtures, as [each program](peft.md#dialects-of-experts) holds their experts.\n",
        *_table("read", DIALECTS, _grouped([p for p in pairs if p.column.dialect], DIALECTS, reasons), reasons),
        "",
        "## All adapters\n",
        *_table("adapter", FORMATS, _grouped([p for p in pairs if not p.column.dialect], FORMATS, reasons), reasons),
        "",
        "## Reasons\n",
        *(f"{number}. {why}" for why, number in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def line_of(
    title: str, columns: Iterable[Column], outcomes: Mapping[Column, Outcome], reasons: Mapping[str, int]
) -> str:
    """One line of a table."""
    return f"| {title} | {' | '.join(_cell(outcomes.get(column), reasons) for column in columns)} |"


def _cell(outcome: Outcome | None, reasons: Mapping[str, int]) -> str:
    if outcome is None:
        return ""
    if outcome.word == "impossible":
        return str(reasons[outcome.why])
    marks = "l" * outcome.as_lora + "p" * outcome.by_part
    shown = f"{float(f'{100 * outcome.error:.1g}'):g} %" if outcome.word == "approximated" else outcome.word
    return f"{shown} {marks}".strip()


def _table(
    first: str,
    columns: Sequence[Column],
    rows: Iterable[tuple[str, Mapping[Column, Outcome]]],
    reasons: Mapping[str, int],
) -> list[str]:
    heads = [first, *map(str, columns)]
    return [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join(['---'] * len(heads))} |",
        *(line_of(title, columns, outcomes, reasons) for title, outcomes in rows),
    ]


def _of(pairs: Iterable[Pair], row: Row) -> dict[Column, Outcome]:
    return {pair.column: pair.outcome for pair in pairs if pair.source.row is row}


def _grouped(
    pairs: Sequence[Pair], columns: Sequence[Column], reasons: Mapping[str, int]
) -> list[tuple[str, Mapping[Column, Outcome]]]:
    """Adapters of a row of which all the same becomes stand in one line."""
    found: list[tuple[str, Mapping[Column, Outcome]]] = []
    for _, of_row in groupby(pairs, key=lambda pair: pair.source.row.title):
        alike: dict[str, tuple[list[str], dict[Column, Outcome]]] = {}
        for name, of_source in groupby(of_row, key=lambda pair: pair.source.name):
            outcomes = {pair.column: pair.outcome for pair in of_source}
            alike.setdefault(line_of("", columns, outcomes, reasons), ([], outcomes))[0].append(_short(name))
        found += [(", ".join(names), outcomes) for names, outcomes in alike.values()]
    return found


def _short(name: str) -> str:
    """A path without what every one has."""
    if not (GOLDEN / name).exists():
        return name
    short = name.removesuffix(Path(name).suffix) if Path(name).stem in ("adapter", "adapter_model") else name
    return f"`{short.removesuffix('/adapter_model').removesuffix('/adapter')}`"
