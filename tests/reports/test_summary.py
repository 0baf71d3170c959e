# SPDX-License-Identifier: Apache-2.0
"""One summary, several renderings: numbers as their columns say, and no text that is obeyed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.reports.result import summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table, Verbatim
from surgery.reports.summary import Summary
from surgery.reports.text import cells, section_lines
from surgery.reports.values import Name, NameList, Sides, Value, cell_text
from tests.support.kit import environment

SMALL = Summary(
    "Merge",
    (
        Facts(
            (("merge", (Name("a|b`c"), " of weight ", Value(0.5, "number", 3))), ("wrote", Value(3_010_000, "bytes")))
        ),
        Table(
            (
                Column("tensor", "name"),
                Column("rank", "integer"),
                Column("survives", "share"),
                Column("empty"),
                Column("note"),
            ),
            (("q_proj", 16, 0.99914, None, "fine"), ("  v_proj", None, math.nan, "", "1 < 2")),
        ),
        Note("... and 3 more", "omitted"),
        Verbatim("one\ntwo"),
        Note("poor", "warning"),
    ),
)

TEXT = """\
merge  a|b`c of weight 0.5
wrote  3.01 MB

tensor    rank  survives  note
q_proj      16    99.91%  fine
  v_proj                  1 < 2

... and 3 more

one
two

warning: poor"""

MARKDOWN = """\
# Merge

- merge: `a\u00a6b'c` of weight 0.5
- wrote: 3.01 MB

| tensor | rank | survives | note |
|---|---:|---:|---|
| `q_proj` | 16 | 99.91% | fine |
| \u2003`v_proj` |  |  | 1 \\< 2 |

... and 3 more

```
one
two
```

**Warning:** poor
"""


def test_text_is_aligned_and_leaves_empty_columns_out():
    assert SMALL.as_text() == str(SMALL) == TEXT


def test_markdown_has_names_as_code():
    assert SMALL.as_markdown() == SMALL._repr_markdown_() == MARKDOWN


def test_json_keeps_numbers_and_the_types_they_are_written_by():
    document = json.loads(json.dumps(SMALL.as_json(), allow_nan=False))
    assert document["title"] == "Merge"
    assert [section["section"] for section in document["sections"]] == ["facts", "table", "note", "verbatim", "note"]
    table = document["sections"][1]
    assert [column["type"] for column in table["columns"]] == ["name", "integer", "share", "text", "text"]
    assert table["rows"] == [["q_proj", 16, 0.99914, None, "fine"], ["  v_proj", None, None, "", "1 < 2"]]


@pytest.mark.parametrize(
    ("value", "type", "digits", "text"),
    [
        (1_235_814_400, "count", 0, "1.24 B"),
        (9_999, "count", 0, "9999"),
        (2_471_628_800, "bytes", 0, "2.47 GB"),
        (1e9, "rate", 0, "1 GB/s"),
        (0.4999, "seconds", 2, "0.50 s"),
        (0.12345, "share", 1, "12.3%"),
        (0.12345, "share", 3, "12.345%"),
        (1234.5, "number", 3, "1.23e+03"),
        (1.0, "fixed", 3, "1.000"),
        (12, "integer", 0, "12"),
        ((64, 128), "shape", 0, "64x128"),
        ((), "shape", 0, "scalar"),
        (True, "flag", 0, "yes"),
        (False, "flag", 0, "no"),
        ({16: 4}, "spread", 6, "16"),
        ({8: 12, 16: 4}, "spread", 6, "8 (12 times), 16 (4 times)"),
        (None, "count", 0, ""),
        (math.nan, "share", 1, ""),
        (math.inf, "number", 3, "inf"),
        (Sides(8, 8), "integer", 0, "8"),
        (Sides(8, None), "integer", 0, "8 | -"),
        (Sides(None, None), "integer", 0, ""),
        (("a ", Value(0.5, "share", 0)), "text", 0, "a 50%"),
        (NameList(("a", "b", "c"), 2), "name", 0, "a, b and 1 more"),
    ],
)
def test_values_are_written_by_their_type(value, type, digits, text):
    assert cell_text(value, type, digits) == text


def hostile() -> st.SearchStrategy[str]:
    return st.text(st.one_of(st.characters(), st.sampled_from("|`\\\n\r\x1b\u202e*_<>[]# ")), max_size=40)


@given(st.lists(st.tuples(hostile(), hostile(), hostile()), min_size=1, max_size=5))
def test_no_text_of_any_cell_breaks_a_markdown_table(rows):
    columns = Column("a name", "name"), Column("words"), Column("a number", "integer")
    table = Table(columns, tuple((name, (words, Name(other)), 1) for name, words, other in rows))
    lines = Summary("", (table,)).as_markdown().splitlines()
    drawn = [line for line in lines if line]
    assert len(drawn) == 2 + len(rows)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in drawn}) == 1
    for line in drawn[2:]:
        spans = re.sub(r"\\.", "", line).count("`")
        assert spans % 2 == 0, "a code span that never ends"


@given(hostile(), hostile(), st.integers(20, 60))
def test_no_text_reaches_a_terminal_that_it_would_act_upon(name, words, width):
    sections: tuple[Section, ...] = (
        Facts(((Name(name), (words, NameList((name, words)))),)),
        Table((Column("name", "name"), Column("words"), Column("figure", "figure")), ((name, words, words),)),
        Note((words, Name(name)), "warning"),
    )
    for rendered in (
        Summary(name, sections).as_text(),
        Summary(name, sections).as_text(width),
        repr(Summary(name, sections)),
    ):
        assert all(line.isprintable() for line in rendered.split("\n"))
    verbatim = "".join(section_lines(Verbatim(name + words)))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", verbatim)


@given(st.lists(st.tuples(hostile(), st.integers(0, 10**6)), min_size=1, max_size=4), st.integers(30, 80))
def test_folding_loses_nothing_and_keeps_to_the_width(rows, width):
    table = Table((Column("name", "name"), Column("number", "integer")), tuple(rows))
    lines = section_lines(table, width)
    assert max(map(cells, lines)) <= width
    whole = "".join(section_lines(table)).replace(" ", "")
    assert sorted("".join(lines).replace(" ", "")) == sorted(whole)


def test_a_narrow_place_gives_up_spare_columns_before_it_folds_names():
    columns = Column("tensor", "name"), Column("moved", "integer", spare=2), Column("noise", "integer", spare=1)
    table = Table(columns, (("model.layers.0", 1, 2),))
    assert section_lines(table, 40)[0] == "tensor          moved  noise"
    assert section_lines(table, 25)[0] == "tensor          noise"
    assert section_lines(table, 20)[0] == "tensor"
    assert section_lines(table, 10) == ["tensor", "model.", "layers.0"]


def test_words_are_broken_only_where_nothing_else_makes_room():
    columns = Column("layers", "name"), Column("remark")
    told = "too large for the type, so that conversion of these weights is left to the program"
    table = Table(columns, (("model.layers.*.self_attn.q_proj", told),))
    for width in (80, 60, 48):
        lines = [line.split("  ") for line in section_lines(table, width)[1:]]
        pieces = {piece.strip() for line in lines for part in line for piece in part.split()}
        assert set(told.split()) <= pieces
    assert section_lines(Table((Column("a", "name"),), (("abcdefghijklmnop",),)), 10) == ["a", "abcdefghij", "klmnop"]


def test_a_spread_of_values_is_folded_where_a_name_alone_would_not_make_it_fit():
    columns = Column("parameters like", "name"), Column("rank", "spread")
    lines = section_lines(Table(columns, (("q_proj", {8: 12, 16: 4}),)), 26)
    assert max(map(len, lines)) <= 26
    assert "".join("".join(lines[-2:]).split()).count("times)") == 2


def test_wide_characters_are_two_columns():
    table = Table((Column("name", "name"), Column("n", "integer")), (("漢字", 1), ("ab", 2)))
    assert section_lines(table) == ["name  n", "漢字  1", "ab    2"]


def test_labels_and_headings_can_stand_out():
    loud = str.upper
    assert section_lines(Facts((("merge", "x"),)), strong=loud) == ["MERGE  x"]
    assert section_lines(Table((Column("rank", "integer"),), ((4,),)), strong=loud) == ["RANK", "   4"]


def test_warnings_and_data_can_be_had_apart():
    assert [note.text for note in SMALL.warnings] == ["poor"]
    assert [type(section) for section in SMALL.data] == [Facts, Table, Verbatim]
    assert SMALL.plus(Note("next")).notes[-1].text == "next"


@summarised
@dataclass(frozen=True)
class Large:
    rows: tuple[int, ...] = tuple(range(100_000))

    def summary(self, *, verbose: bool = False) -> Summary:
        return Summary("Large", (Facts((("rows", Value(len(self.rows), "count")),)),))


def test_a_result_in_a_notebook_is_its_summary():
    assert repr(Large()) == "<Large rows: 100 k>"
    assert str(Large()) == "rows  100 k"
    assert Large()._repr_markdown_() == "# Large\n\n- rows: 100 k\n"


RESULTS = sorted(
    name for name in surgery.__all__ if is_dataclass(kind := getattr(surgery, name)) and hasattr(kind, "as_json")
)


@pytest.mark.parametrize("name", RESULTS)
def test_results_have_a_summary_and_a_short_repr(name):
    result = getattr(surgery, name)
    assert callable(result.summary)
    assert result.__repr__.__qualname__.startswith("summarised")
    assert callable(result._repr_markdown_)


def test_every_result_of_a_verb_is_among_them():
    assert len(RESULTS) >= 13


@pytest.mark.parametrize("reference", ["examples/base", "examples/lora", "examples/prompt"])
def test_the_repr_of_a_real_result_is_one_short_line(reference):
    result = surgery.inspect(reference)
    assert len(repr(result)) < 300
    assert "\n" not in repr(result)
    assert reference in repr(result)
    assert len(result.summary(verbose=True).as_text()) >= len(str(result))


def test_a_summary_costs_no_heavy_import():
    code = (
        "import sys, surgery\n"
        "for path in ('examples/base', 'examples/lora'): surgery.inspect(path).summary(verbose=True).as_markdown()\n"
        "str(surgery.formats()), str(surgery.report('examples/lora', base='examples/base'))\n"
        "print(sorted({'torch', 'numpy', 'onnx', 'rich', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_import_neither_renderer_nor_rich():
    """A new renderer is a file beside the others: nothing that makes a summary names one."""
    root = Path(__file__).parents[2] / "surgery"
    makers = [
        path for path in root.rglob("*.py") if "summary(self" in path.read_text() and path.parent.name != "reports"
    ]
    assert len(makers) > 8
    for path in makers:
        assert not re.search(r"reports\.(markdown|text) import|import rich", path.read_text()), path
