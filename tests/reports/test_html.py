# SPDX-License-Identifier: Apache-2.0
"""A page is one file that loads and runs nothing, is told in words as well, and shows names as they are and does not obey them."""

from __future__ import annotations

import math
import re
import unicodedata
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery._version import __version__
from surgery.reports.drawings import Bars, Drawing, HeatMap, Lines, Mark
from surgery.reports.html.axis import axis_over
from surgery.reports.html.page import as_page
from surgery.reports.sections import Chart, Column, Facts, Note, Section, Table, Verbatim
from surgery.reports.summary import Summary
from surgery.reports.values import Name, NameList, Value
from tests.support.page_reader import check_page, read_page

COLUMNS = Column("rank", "integer"), Column("layers", "name"), Column("missing", "share"), Column("size", "bytes")
ROWS = tuple((rank, layers, 1 / rank, rank * 1000) for layers in ("all", "attention") for rank in (4, 8, 16))
DRAWINGS: dict[str, Drawing] = {
    "lines": Lines(0, (2,), 1, log_x=True, marks=(Mark("knee", x=8), Mark("edge", y=0.1))),
    "two columns": Lines(0, (2, 3), 1, log_y=True),
    "points": Lines(3, (2,), joined=False),
    "bars": Bars(1, (2,)),
    "a stack": Bars(1, (2, 3), stacked=True),
    "heat map": HeatMap(1, (2, 3), log=True),
}


def of_all(name: str, words: str) -> tuple[Section, ...]:
    """Every section there is, with text in every place."""
    table = Table(
        (Column("name", "name"), Column(words), Column("n", "integer")), ((name, (words, Name(name)), 1),), words
    )
    drawn = Table((Column("name", "name"), Column(words, "number")), ((name, 2.0), (f"{name}2", 3.0)))
    return (
        Facts(((Name(name), (words, NameList((name, words)))), ("", words))),
        table,
        *(Chart(words, drawn, drawing, (words, Name(name))) for drawing in (Bars(0, (1,)), HeatMap(0, (1,)))),
        Chart(words, drawn, Lines(1, (1,), 0, marks=(Mark(words, x=2.0),))),
        Note((words, Name(name)), "warning"),
        Verbatim(name + words),
    )


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
def test_a_chart_is_a_picture_and_the_table_it_was_drawn_from(drawing):
    summary = Summary("Choice", (Chart("What a rank costs", Table(COLUMNS, ROWS), drawing, "it falls"),))
    page = check_page(summary.as_html())
    (figure,) = page.all("figure")
    (picture,) = [svg for svg in figure.all("svg") if "role" in svg.attributes]
    assert picture.attributes["aria-label"].startswith("What a rank costs: ")
    shapes = [shape for shape in picture.all("path", "rect") if shape.attributes.get("class", "").split()[0] != "grid"]
    assert len(shapes) >= 3
    cells = [cell.text for cell in figure.all("tbody")[0].all("th", "td")]
    assert cells[:4] == ["4", "all", "25.00%", "4 kB"]
    assert "it falls" in figure.all("figcaption")[0].text


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS)
@pytest.mark.parametrize(
    "rows", [(), ((None, "a", None, None),), ((4, "a", math.nan, -1),)], ids=["none", "empty", "odd"]
)
def test_a_chart_of_nothing_is_a_table_alone(drawing, rows):
    page = check_page(Summary("Choice", (Chart("Ranks", Table(COLUMNS, rows), drawing),)).as_html())
    assert page.all("table")


def test_a_chart_is_one_line_or_its_table_where_nothing_is_drawn():
    table = Table(COLUMNS[:2], ((4, "all"),))
    charts = (
        Chart("Ranks", table, Bars(1, (0,)), ("least ", Value(4, "integer"))),
        Chart("More", table, Bars(1, (0,)), "x"),
    )
    assert Summary("", charts).as_text() == "Ranks: least 4\nMore: x"
    assert Summary("", charts).as_markdown() == "Ranks: least 4\n\nMore: x\n"
    silent = Chart("Ranks", table, Bars(1, (0,)))
    assert Summary("", (silent,)).as_text() == Summary("", (table,)).as_text()
    assert Summary("", (silent,)).as_markdown() == Summary("", (table,)).as_markdown()
    (section,) = Summary("", (silent,)).as_json()["sections"]
    assert (section["section"], section["drawings"]["kind"]) == ("chart", "bars")


def test_bars_say_what_they_measure_and_whose_they_are():
    long = "prefill.onnx: 8 decode steps of 3 rows, padded on the "
    table = Table((Column("check"), Column("of the bound", "share")), ((f"{long}left", 0.1), (f"{long}right", 0.2)))
    picture = next(svg for svg in check_page(Summary("", (Chart("t", table, Bars(0, (1,))),)).as_html()).all("svg"))
    assert [text.text for text in picture.all("text")] == [
        "of the bound", f"{long}left", "10.00%", f"{long}right", "20.00%",
    ]  # fmt: skip
    bars, names = picture.all("rect"), picture.all("text")[1::2]
    assert all(float(name.attributes["y"]) < float(bar.attributes["y"]) for name, bar in zip(names, bars, strict=True))


def test_a_page_says_how_to_have_what_it_leaves_out():
    summary = Summary("t", (Note("... and 12 more", "omitted"), Note("dry run")))
    page = check_page(summary.as_html())
    assert [note.text for note in page.all("p")] == ["... and 12 more; a page written with -v has all", "dry run"]
    part = check_page(summary._repr_html_(), whole=False)
    assert [note.text for note in part.all("p")][1] == "... and 12 more; summary(verbose=True) has all"


@pytest.mark.parametrize(
    ("title", "subjects", "heading"),
    [
        ("Differences", ["base", "tuned/"], "Differences: base, tuned"),
        ("Verification", ["/models/merged/"], "Verification: merged"),
        ("lora", ["examples/lora"], "lora"),
        ("tuned as a LoRA of base", ["base", "tuned"], "tuned as a LoRA of base"),
        ("Merge", ["base", *"abcdef"], "Merge: base, a, b, c, and 3 more"),
        ("Speed", ["a\x1b<b>", "a\x1b<b>"], "Speed: a\\x1b<b>"),
        ("Environment", [], "Environment"),
    ],
)
def test_a_page_says_what_it_is_about(title, subjects, heading):
    page = check_page(Summary(title, (Note("x"),)).asked("verb", subjects).as_html())
    assert [page.all(tag)[0].text for tag in ("title", "h1")] == [heading, heading]
    (footer,) = page.all("footer")
    assert footer.text.startswith(f"Written by surgery verb, version {__version__}.")


def test_paper_is_light_and_cuts_no_table():
    """As Chromium shows it: ``tools/page_pictures.py``."""
    style = resources.files("surgery.reports.html").joinpath("style.css").read_text()
    dark, paper = (style.partition(f"@media {medium} {{")[2] for medium in ("(prefers-color-scheme: dark)", "print"))
    colours = set(re.findall(r"--\w+(?=:)", dark.partition("}")[0]))
    assert len(colours) > 20
    assert colours == set(re.findall(r"--\w+(?=:)", paper)), "a colour of the dark scheme is printed"
    assert "@media" not in paper, "a later rule wins over that of paper"
    assert re.search(r"\.scroll \{ overflow: visible; max-height: none; \}", paper)


def test_one_table_may_have_several_pictures():
    chart = Chart("Ranks", Table(COLUMNS, ROWS), tuple(DRAWINGS.values()))
    (figure,) = check_page(Summary("", (chart,)).as_html()).all("figure")
    assert len([svg for svg in figure.all("svg") if "role" in svg.attributes]) == len(DRAWINGS)


def test_points_lie_where_the_numbers_say():
    rows = ((1, 1.0), (2, 3.0), (3, 2.0))
    table = Table((Column("x", "integer"), Column("y", "number")), rows)
    page = check_page(Summary("", (Chart("t", table, Lines(0, (1,))),)).as_html())
    (line,) = [shape for shape in page.all("path") if shape.attributes["class"].startswith("line")]
    points = [tuple(map(float, point.split())) for point in line.attributes["d"][1:].split("L")]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] > points[2][1] > points[1][1], "down is up"
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[1][1] == pytest.approx(2 * (points[0][1] - points[2][1]), abs=0.2)


def test_a_column_that_does_not_depend_on_the_group_is_one_line():
    """Full copies of N tasks are the same whatever adapter stands beside them, and so they are where one has more points."""
    columns = Column("tasks", "integer"), Column("with"), Column("copies", "bytes"), Column("adapters", "bytes")
    rows = tuple((n, name, n * 100, 100 + n * size) for n in (1, 10) for name, size in (("a", 3), ("b", 5)))
    table = Table(columns, (*rows, (2, "both", 200, 108)))
    picture = check_page(Summary("", (Chart("t", table, Lines(0, (2, 3), by=1)),)).as_html())
    assert [entry.text for entry in picture.all("li")] == ["copies", "adapters, a", "adapters, b", "adapters, both"]


def test_colours_of_a_heat_map_go_by_the_numbers():
    rows = tuple((f"{n}", 10.0**n, None if n == 1 else 1.0 + n) for n in range(9))
    table = Table((Column("layer", "name"), Column("q", "number"), Column("k", "number")), rows)

    def colours(drawing: HeatMap) -> list[str]:
        page = check_page(Summary("", (Chart("t", table, drawing),)).as_html())
        picture = next(svg for svg in page.all("svg") if "role" in svg.attributes)
        return [cell.attributes["class"][-1] for cell in picture.all("rect")]

    assert colours(HeatMap(0, (1,), log=True)) == list("012345678")
    assert colours(HeatMap(0, (1,))) == list("000000008")
    assert len(colours(HeatMap(0, (2,)))) == 8, "a number that is not there has no cell"


@pytest.mark.parametrize("log", [False, True], ids=["linear", "by ratios"])
def test_a_heat_map_makes_nothing_of_numbers_that_are_nearly_equal(log: bool):
    table = Table((Column("layer", "name"), Column("q", "number", 3)), tuple((f"{n}", 10 + n / 10) for n in range(9)))
    page = check_page(Summary("", (Chart("t", table, HeatMap(0, (1,), log=log)),)).as_html())
    picture = next(svg for svg in page.all("svg") if "role" in svg.attributes)
    assert len({cell.attributes["class"] for cell in picture.all("rect")}) == 1
    assert page.all("li")[0].text == "all alike: 10 to 10.8"


def test_numbers_by_ratios_that_are_within_a_factor_of_two_still_have_their_colours():
    table = Table((Column("layer", "name"), Column("q", "number")), (("0", 0.07), ("1", 0.1)))
    page = check_page(Summary("", (Chart("t", table, HeatMap(0, (1,), log=True)),)).as_html())
    assert page.all("li")[0].text == "0.05 (left) to 0.1 (right); equal steps are equal ratios"
    picture = next(svg for svg in page.all("svg") if "role" in svg.attributes)
    assert [cell.attributes["class"] for cell in picture.all("rect")] == ["cell h4", "cell h8"]


def test_equal_numbers_are_said_to_be_equal():
    table = Table((Column("layer", "name"), Column("q", "number")), (("0", 0.0), ("1", 0.0)))
    page = check_page(Summary("", (Chart("t", table, HeatMap(0, (1,))),)).as_html())
    assert page.all("li")[0].text == "all are 0"


def test_a_chart_of_one_number_of_tasks_says_it():
    page = check_page(surgery.report("examples/lora", base="examples/base", tasks=(100,)).summary().as_html())
    (picture,) = [svg for svg in page.all("svg") if "role" in svg.attributes]
    assert picture.attributes["aria-label"] == "Storage for 100 tasks: full copies, one base and adapters by adapter"


def test_what_a_column_says_stands_below_its_table():
    table = Table((Column("rank", "integer", says="directions"), Column("size", "bytes")), ((4, 1000),))
    page = check_page(Summary("", (table,)).as_html())
    (columns,) = [told for told in page.all("dl") if told.attributes.get("class") == "columns"]
    assert [(term.text, about.text) for term, about in zip(columns.all("dt"), columns.all("dd"), strict=True)] == [
        ("rank", "directions")
    ]


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=12), st.booleans(), st.booleans(), st.booleans())
def test_an_axis_keeps_order_and_holds_every_value(values, log, zero, each):
    axis = axis_over(values, 40.0, 400.0, log=log, zero=zero, each=each)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(40 - 1e-6 <= place <= 400 + 1e-6 for place in places)
    assert 1 <= len(axis.ticks) <= 14
    assert list(axis.ticks) == sorted(set(axis.ticks))


def hostile() -> st.SearchStrategy[str]:
    return st.text(
        st.one_of(st.characters(categories=None), st.sampled_from("<>&\"'`=/\\\n\r\t\0\x1b\u202e{}%;:()")), max_size=40
    ) | st.sampled_from(
        ("</style><script>alert(1)</script>", "{{7*7}}{% x %}", "\"onload='x", "&lt;b&gt;", "]]>", "<!--")
    )


@settings(max_examples=60)
@given(hostile(), hostile())
def test_no_text_becomes_markup(name, words):
    words = f"w{words}"
    summary = Summary(words, of_all(name, words))
    for text, whole in ((summary.as_html(), True), (summary._repr_html_(), False)):
        text.encode()
        page = check_page(text, whole=whole)
        assert not page.all("script")
        acting = {char for char in page.text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        assert acting <= {"\n", "\t"}


def test_text_is_shown_as_it_is():
    words = "1 < 2 & \"x\" 'y' {{z}}"
    page = read_page(Summary("", (Note(words), Note((Name(words),)), Verbatim(words))).as_html())
    assert [entry.text for entry in page.all("p", "pre")] == [words] * 3


def test_equal_summaries_are_equal_bytes():
    one, other = (surgery.report("examples/lora", base="examples/base").summary().as_html() for _ in range(2))
    assert one == other
    assert check_page(one).all("figure")


def test_a_fragment_is_small_whatever_the_result_is():
    rows = tuple((f"{n}" * 100, n, n / 7, n * 1000) for n in range(10_000))
    columns = Column("layer", "name"), *COLUMNS[1:2], *COLUMNS[2:]
    drawings = HeatMap(0, (2, 3)), Bars(0, (2,)), Lines(3, (2,), 0)
    table = Table(columns, rows)
    sections = [table, *(Chart("t", Table(columns, rows[:160]), drawing, "x") for drawing in drawings)]
    fragment = Summary("Large", (*sections, *(Note("x" * 300) for _ in range(5000))))._repr_html_()
    assert len(fragment) < 1 << 18
    assert "9960 more rows" in fragment
    check_page(fragment, whole=False)
    assert as_page("Large", sections).count("<tr>") > 2000


@pytest.mark.parametrize("reference", ["examples/base", "examples/lora", "examples/prompt"])
def test_a_result_in_a_notebook_is_the_same_page(reference):
    result = surgery.inspect(reference)
    fragment = check_page(result._repr_html_(), whole=False)
    shown = read_page(result.summary().as_html())
    assert [cell.text for cell in fragment.all("dd", "th")][:12] == [cell.text for cell in shown.all("dd", "th")][:12]
