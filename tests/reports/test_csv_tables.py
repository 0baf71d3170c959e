# SPDX-License-Identifier: Apache-2.0
"""Tables as CSV: any reader has them back, numbers in full, and no spreadsheet computes what a name says."""

from __future__ import annotations

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.reports.drawings import Bars
from surgery.reports.sections import Chart, Column, Facts, Table
from surgery.reports.summary import Summary
from surgery.reports.values import Name, Sides, Value


def rows_of(*sections) -> list[list[str]]:
    return list(csv.reader(io.StringIO(Summary("", sections).as_csv(), newline="")))


def test_numbers_are_whole_and_text_is_text():
    columns = (
        Column("tensor", "name"), Column("bytes", "bytes"), Column("survives", "share"), Column("shape", "shape"),
        Column("rank", "integer"), Column("note"),
    )  # fmt: skip
    table = Table(columns, (('a, "b"', 3_007_696, 1 / 3, (2, 3), None, ("off by ", Value(0.5, "share"))),))
    assert rows_of(Facts((("a", "b"),)), table) == [
        ["tensor", "bytes", "survives", "shape", "rank", "note"],
        ['a, "b"', "3007696", repr(1 / 3), "2x3", "", "off by 50.00%"],
        [],
        ["fact", "value"],
        ["a", "b"],
    ]


def test_facts_are_rows_behind_the_tables_with_their_numbers_in_full():
    facts = Facts(
        (("KL divergence", (Value(2.2149e-05, "number", 2), " nats per token")), ("text", (Name("=a.txt"), "!")))
    )
    assert rows_of(facts, Table((Column("n", "integer"),), ((1,),))) == [
        ["n"], ["1"], [], ["fact", "value"], ["KL divergence", "2.2149e-05"], ["text", "'=a.txt!"],
    ]  # fmt: skip


@pytest.mark.parametrize(("cell", "text"), [(-1.5, "-1.5"), (math.nan, ""), (math.inf, "inf"), (Sides(8, 4), "8 | 4")])
def test_a_number_below_zero_stays_one(cell, text):
    assert rows_of(Table((Column("n", "number"),), ((cell,),)))[1:] == [[text]] if text else [[]]


def test_a_number_that_the_screen_shows_with_its_share_is_whole():
    cell = Value(294_912, "count"), " (", Value(0.197, "share", 1), ")"
    assert rows_of(Table((Column("attention", "figure"),), ((cell,),))) == [["attention"], ["294912"]]


def test_several_tables_lie_below_each_other():
    table = Table((Column("n", "integer"),), ((1,),))
    assert rows_of(table, Chart("c", table, Bars(0, (0,)))) == [["n"], ["1"], [], ["n"], ["1"]]


def test_a_name_without_end_does_not_stop_a_reader():
    assert len(rows_of(Table((Column("name", "name"),), (("\x1b" * 10**6,),)))[1][0]) <= 1 << 15


BEGINNINGS = st.sampled_from(
    ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "", "'", ";", ";=", "a; -", "\uff1d", "\uff20", "\ud800"]
)


@given(BEGINNINGS, st.text(st.characters(categories=None), max_size=30), st.integers(0, 3))
def test_no_cell_is_a_formula(beginning, rest, kind):
    name = beginning + rest
    column = Column("name", "name") if kind < 2 else Column("words")
    cell = name if kind % 2 else (name, Name(name))
    text = Summary("", (Table((column, Column(name)), ((cell, "x"),)),)).as_csv()
    text.encode()
    heading, row = csv.reader(io.StringIO(text, newline=""))
    for shown in (heading[1], row[0]):
        for part in shown.split(";"):  # as where a comma is decimal
            assert not part.lstrip().startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"))
        assert shown.isprintable()
