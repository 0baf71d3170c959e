# SPDX-License-Identifier: Apache-2.0
"""Every format that is read, converted to every format that is written: docs/matrix.md is what comes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgery._version import __version__
from surgery_formats.adapters.peft.dialects import BUILT_IN as DIALECTS
from surgery_formats.adapters.registry import BUILT_IN, read_adapter
from surgery_formats.errors import FitError, MalformedError
from tests.support.adapter_files import GOLDEN
from tests.support.matrix import outcome, outcomes
from tests.support.matrix_page import PAGE, line_of, page, reasons_in
from tests.support.matrix_rows import COLUMNS, REFUSED, ROWS, Column, Row, adapters_at, row_of, sources_of


def test_every_format_has_a_row() -> None:
    assert {row.format for row in ROWS} == {one.name for one in BUILT_IN}, (
        "give it a row in tests/support/matrix_rows.py"
    )
    assert {f"PEFT, experts of {one.name}" for one in DIALECTS} <= {row.title for row in ROWS}


def test_every_golden_adapter_is_of_one_row() -> None:
    rows = {row_of(path, known).title for path, known in adapters_at(GOLDEN)}
    assert rows == {row.title for row in ROWS if row.make is None}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_without_a_line_is_refused(name: str) -> None:
    with pytest.raises((FitError, MalformedError), match=REFUSED[name]):
        read_adapter(GOLDEN / name, 12 if name.startswith("loralib") else None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_an_adapter_becomes_what_the_page_says(row: Row, tmp_path: Path) -> None:
    """Each conversion is read back and merged; what comes of the pairs is the line of the page."""
    text = PAGE.read_text(encoding="utf-8")
    (source,) = sources_of(row, tmp_path / "made", example=True)
    found = {pair.column: pair.outcome for pair in outcomes(source, tmp_path / "tried")}
    line = line_of(row.title, [one for one in COLUMNS if not one.dialect], found, reasons_in(text))
    assert line in text.splitlines(), "if it should be so: python tools/matrix_page.py"


def test_the_page_counts_as_many_formats_as_are_asked_for() -> None:
    read, written = map(int, re.findall(r"(\d+) formats read .*?, (\d+) written", PAGE.read_text(encoding="utf-8"))[0])
    assert read == len(ROWS) >= 25
    assert written >= 15


@pytest.mark.parametrize(
    ("name", "to", "wanted"),
    [
        ("kohya/sd1/peft-text-encoder", "diffusers", "exact"),  # the header names modules as the keys do
        ("kohya/sd1/dora-in/adapter.safetensors", "diffusers", "its magnitudes belong to columns"),
        ("kohya/sdxl/mixed/adapter.safetensors", "onnx-adapter", "the inputs of one graph"),
        ("mlx/qwen2/lora-tied", "onnx-adapter", "folded"),  # the head gets a LoRA of its own, which keeps it tied
        ("lycoris/glora/adapter.safetensors", "bare", "do not tell such a file from a model"),
        ("adapterhub/gpt2-lora", "bare", "do not tell such a file"),  # transformer. is diffusers' beginning
        ("adapterhub/bert-union", "adapterhub", "exact"),
        ("tensorrt_llm/dora", "comfyui", "one kind of change for each module"),
    ],
)
def test_pairs_that_were_wrong_once(name: str, to: str, wanted: str, tmp_path: Path) -> None:
    row = row_of(GOLDEN / name, dict(adapters_at(GOLDEN))[GOLDEN / name])
    (source,) = (one for one in sources_of(row, tmp_path, example=False) if one.name == name)
    found = outcome(source, Column(to), tmp_path / "tried", rank=None)
    assert wanted == found.word or wanted in found.why


@pytest.mark.slow
def test_every_golden_adapter_becomes_what_the_page_says(tmp_path: Path) -> None:
    pairs = []
    for number, row in enumerate(ROWS):
        folder = tmp_path / str(number)
        for source in sources_of(row, folder / "made", example=False):
            pairs += outcomes(source, folder / "tried")
    assert page(pairs, __version__) == PAGE.read_text(encoding="utf-8"), "run: python tools/matrix_page.py"
