# SPDX-License-Identifier: Apache-2.0
"""What a page shows of an extraction is what other extractions then do: the knee, the choice of auto, the edge of noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.extraction.extract_charts import knee_of, rank_advice
from surgery.extraction.spectra import role_spectra
from surgery.reports.sections import Chart
from surgery.reports.values import phrase_text
from tests.support.page_reader import check_page

RANK = 8  # of the example's LoRA


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "merged"
    surgery.merge("examples/base", "examples/lora", output=path)
    return path


@pytest.fixture(scope="module")
def result(merged: Path) -> surgery.ExtractResult:
    return surgery.extract_lora("examples/base", merged, rank=4, table=True, dry_run=True)


def test_the_spectra_of_a_merged_lora_fall_below_the_edge_behind_its_rank(result):
    assert {spectrum.role: spectrum.matrices for spectrum in result.spectra} == {"mlp": 18, "attention": 24}
    for spectrum in result.spectra:
        assert spectrum.by_edge
        assert spectrum.complete
        assert spectrum.above == RANK
        assert spectrum.values[RANK - 1] > 10
        assert spectrum.values[RANK] < 1
        assert list(spectrum.values) == sorted(spectrum.values, reverse=True)


def test_spectra_come_in_one_order_whichever_thread_was_done_first():
    matrix = SimpleNamespace(values=(3.0, 2.0), edge=1.0, signal=2)
    entry: Any = SimpleNamespace(matrices=(matrix,), target=SimpleNamespace(largest_rank=2))
    done = [("lm_head", entry), ("layers.1.mlp", entry), ("layers.0.attention", entry)]
    for order in (done, done[::-1]):
        assert [spectrum.role for spectrum in role_spectra(dict(order), str)] == sorted(path for path, _ in done)


def test_the_choice_of_auto_is_what_auto_then_does(result, merged):
    (auto,) = [choice for choice in result.table if choice.layers == "auto"]
    done = surgery.extract_lora("examples/base", merged, rank=surgery.Rank.auto, dry_run=True)
    assert auto.rank == max(row.rank for row in done.rows) == RANK
    assert auto.parameters == done.parameters
    assert auto.residual == pytest.approx(done.residual, rel=1e-6)


def test_the_sentence_counts_the_directions_that_there_are_and_says_where_more_may_be():
    """64 were looked at for the table; matrices of the MLP have 128."""
    result = surgery.extract_lora("examples/base", "examples/tuned", rank=4, table=True, dry_run=True)
    charts = {section.title: section for section in result.summary().sections if isinstance(section, Chart)}
    says = phrase_text(charts["Spectra of the change, times the edge of noise"].says)
    assert "mlp at least 64 of 128" in says
    assert "attention at least 64 (median) of 64 to 128" in says


def test_the_table_says_in_words_what_the_page_marks(result):
    lines = [line.removeprefix("choice").strip() for line in result.summary().as_text().splitlines()]
    first = lines.index("the knee is at rank 8 (224 kB): more directions bring less")
    assert lines[first + 1] == "rank auto takes up to 8 (224 kB)"
    assert lines[first + 2].endswith("--eval TEXT measures it")


def test_the_table_says_too_what_cannot_be_told(result):
    choices = [replace(choice, residual=0.9) for choice in result.table if choice.layers != "auto"]
    bend, own, _ = (phrase_text(text) for _, text in rank_advice(choices).rows)
    assert bend == "there is no knee: none of ranks 4 to 64 stands out"
    assert own.startswith("what rank auto takes is not known")


def test_auto_is_not_told_where_more_may_stand_out_of_the_noise():
    result = surgery.extract_lora("examples/base", "examples/tuned", rank=4, table=True, dry_run=True)
    assert any(row.signal and not row.signal.complete for row in result.rows)
    assert not [choice for choice in result.table if choice.layers == "auto"]


def test_the_page_marks_both(result):
    charts = {section.title: section for section in result.summary().sections if isinstance(section, Chart)}
    drawings = charts["Missing of the whole change, by rank and size"].drawings
    assert [[mark.text for mark in drawing.marks] for drawing in drawings] == [
        ["knee: 8", "auto: up to 8"],
        ["knee: rank 8", "auto"],
    ]
    page = check_page(result.summary().as_html())
    assert len(page.all("figure")) == 4
    words = [text.text for text in page.all("text")]
    assert {"knee: 8", "auto: up to 8", "edge of rounding noise", "self_attn.q_proj"} <= set(words)


def test_the_page_names_the_models_and_says_of_every_column_what_it_is(result):
    page = check_page(result.summary().as_html())
    assert page.all("h1")[0].text == page.all("title")[0].text == "merged as a LoRA of base"
    for table in page.all("main")[0].all("table"):
        told = {
            term.text for each in page.all("dl") if each.attributes.get("class") == "columns" for term in each.all("dt")
        }
        headings = {heading.text for heading in table.all("thead")[0].all("th")}
        if headings & {"missing", "missing of all"}:
            assert headings - told <= {"size"}


def test_rows_of_some_layers_say_that_they_are_not_of_these_alone(result):
    text = result.summary().as_text()
    assert "factors for     missing of all" in text
    assert " only attention " in text
    assert " only MLP " in text
    assert {choice.layers for choice in result.table} == {"attention", "mlp", "all", "auto"}


def test_what_is_missing_is_drawn_on_a_scale_of_all(result):
    (drawing,) = (
        section.drawings
        for section in result.summary().sections
        if isinstance(section, Chart) and section.title == "Missing of the change of each weight"
    )
    assert (drawing.low, drawing.high) == (0.0, 1.0)


def test_the_manifest_and_json_have_no_pictures(result):
    assert "spectra" not in result.as_json()
    assert "spectra" not in result.as_manifest()


@given(st.integers(1, 6), st.floats(0.01, 0.3))
def test_the_knee_of_a_low_rank_change_is_its_rank(power, noise):
    ranks = [2**n for n in range(8)]
    left = [max(1 - rank / 2**power, 0) ** 0.5 + noise * (1 - rank / 256) for rank in ranks]
    found = knee_of(list(zip(ranks, left, strict=True)))
    assert found == 2**power or (power == 6 and found == 64)


@pytest.mark.parametrize(
    "left",
    [[1, 1, 1], [0.5, 0.6, 0.7], [0.9, 0.8, 0.7], [1.0, 0.99, 0.2], [1.0, 0.0], [], [0.004, 0.002, 0.001, 0.001]],
)
def test_a_curve_without_a_bend_has_no_knee(left):
    assert knee_of([(2**n, value) for n, value in enumerate(left)]) is None


def test_values_are_the_singular_values_over_the_edge(result, merged):
    name = "model.layers.0.self_attn.q_proj.weight"
    sides = [surgery.open(path).main.tensors[name] for path in ("examples/base", merged)]
    before, after = (np.asarray(side.read()).astype(np.float64) for side in sides)
    values = np.linalg.svd(after - before, compute_uv=False)
    (row,) = [row for row in result.rows if row.name == name]
    assert (values > row.signal.edge).sum() == row.signal.count == RANK
