# SPDX-License-Identifier: Apache-2.0
"""Locate, merge, slots and fold on a graph of every exporter, against PEFT; docs/exporters.md is what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

import surgery
from surgery_formats import FitError
from tests.support.graph_page import PAGE, line_of, other_line, without_figures
from tests.support.graph_pairs import PAIRS, Pair, difference, exported_here
from tests.support.graph_table import (
    BUILT_IN,
    Measured,
    Slotted,
    main_adapter,
    measured,
    merged_by_peft,
    other_base,
    slotted,
)

OWN = ("export-llama-cpu", "export-qwen2-portable", "export-bert-cpu")
NO_SLOTS = {"fused-bert": "Attention", "fused-bert-fp16": "Attention"}
STEP = 1.0 + 1e-3  # of a quantiser: the farthest that a code may be from its number, where a range is not symmetric
HALF = 0.5 + 1e-3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return PAIRS | exported_here(tmp_path_factory.mktemp("own"))


def is_right(pair: Pair, one: Measured) -> None:
    assert one.located == one.weights > 0
    assert one.elsewhere == 0
    if pair.dtype == "float32":
        assert one.after < 1e-4
    elif pair.dtype == "float16":
        assert one.after < 3 * one.before < 3e-2
    else:
        assert one.steps < STEP
        assert one.steps_after < HALF
        assert one.after < 4 * one.before


def has_right_slots(pair: Pair, one: Slotted, before: float) -> None:
    if pair.name in NO_SLOTS:
        assert one.refused == f"no place for slots in {NO_SLOTS[pair.name]}"
        return
    assert not one.refused
    assert one.silent
    within = 1e-4 if pair.dtype == "float32" else 4 * before
    assert one.active is None or one.active < within
    assert one.fused < (2e-6 if pair.dtype == "float32" else within)
    if pair.dtype.startswith("int"):
        assert one.folded is None
    else:
        assert one.folded is not None
        assert one.folded < within


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_a_graph_takes_an_adapter_as_the_page_says(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    adapter = main_adapter(pair)
    merged = None if name in BUILT_IN else measured(pair, adapter)
    slots = slotted(pair, adapter)
    if merged is not None:
        is_right(pair, merged)
    has_right_slots(pair, slots, 0.0 if merged is None else merged.before)
    lines = {without_figures(line) for line in PAGE.read_text(encoding="utf-8").splitlines()}
    assert without_figures(line_of(pair, adapter, merged, slots)) in lines, (
        "if it should be so: tools/exporters_page.py"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_other_adapters_are_merged_as_the_page_says(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    results = {one: measured(pair, one) for one in pair.adapters if one != main_adapter(pair) and name not in BUILT_IN}
    cut_off = pair.name == "qdq-vit"  # what leaves the ranges of activations that were measured before
    for one in results.values():
        assert one.located == one.weights
        assert one.elsewhere == 0
        assert cut_off or is_right(pair, one) is None
    lines = {without_figures(line) for line in PAGE.read_text(encoding="utf-8").splitlines()}
    assert not results or without_figures(other_line(name, results)) in lines


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_a_graph_of_another_base_is_refused(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair, base = pairs[name], other_base(pairs[name], tmp_path / "other")
    adapter = pair.adapter(main_adapter(pair))
    with pytest.raises(FitError, match="not in the graph"):
        surgery.merge(pair.graph, adapter, graph_of=base, output=tmp_path / "merged")
    with pytest.raises(FitError):
        surgery.insert(pair.graph, adapter, base=base, output=tmp_path / "slots")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "slots").exists()


@pytest.mark.parametrize("name", ["genai-llama", "dynamo-unet", "q4-llama", "script-resnet"])
def test_a_merge_is_refused_a_second_time(name: str, tmp_path: Path) -> None:
    pair = PAIRS[name]
    surgery.merge(pair.graph, pair.adapter("lora"), graph_of=pair.base, output=tmp_path / "once")
    with pytest.raises(FitError):
        surgery.merge(tmp_path / "once" / "model.onnx", pair.adapter("lora"), graph_of=pair.base, output=tmp_path / "b")
    again = surgery.locate(tmp_path / "once" / "model.onnx", pair.base, adapters=pair.adapter("lora"))
    assert not {one.label for one in again.located.missing} & set(pair.expected("lora"))


def test_pefts_own_merge_is_what_another_graph_of_it_holds(tmp_path: Path) -> None:
    """The oracle's checkpoint: an exported graph of PEFT's merge has the weights of the merged graph, but for rounding."""
    pair = PAIRS["genai-llama"]
    peft = merged_by_peft(pair, "lora", tmp_path / "peft")
    surgery.merge(pair.graph, pair.adapter("lora"), graph_of=pair.base, output=tmp_path / "merged")
    found = surgery.locate(tmp_path / "merged" / "model.onnx", peft).located
    assert {one.label for one in found.missing} <= {key[8:] for key in pair.expected("lora")}
    assert all(one.distance < 1e-6 for one in found.near)


@pytest.mark.parametrize(("name", "told"), [("qdq-vit", True), ("script-vit", False), ("quantized-bert", False)])
def test_ranges_of_activations_are_told(name: str, told: bool, tmp_path: Path) -> None:
    pair = PAIRS[name]
    adapter = pair.adapter(main_adapter(pair))
    merged = surgery.merge(pair.graph, adapter, graph_of=pair.base, output=tmp_path / "merged")
    slots = surgery.insert(pair.graph, adapter, base=pair.base, output=tmp_path / "slots")
    for result in (merged, slots):
        assert any("ranges" in text for text in result.warnings) is told


def extracted(before: Pair, after: Pair, adapter: str, place: Path) -> float:
    """How far a LoRA taken from a graph and another one with an adapter in it is from PEFT's merge, in the base."""
    surgery.merge(after.graph, after.adapter(adapter), graph_of=after.base, output=place / "tuned")
    tuned = place / "tuned" / "model.onnx"
    surgery.extract_lora(before.graph, tuned, rank=4, graph_of=before.base, output=place / "lora")
    surgery.merge(before.base, place / "lora", output=place / "merged")
    weights = load_file(next((place / "merged").glob("*.safetensors")))
    expected = {key[8:]: value for key, value in before.expected(adapter).items() if key.startswith("weights.")}
    return max(difference(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["genai-llama", "optimised-llama", "optimum-gpt2", "fused-bert", "dynamo-unet"])
def test_what_was_merged_is_extracted_from_two_graphs(name: str, tmp_path: Path) -> None:
    """However strong it is: in graphs with the same nodes, weights lie at the same places."""
    assert extracted(PAIRS[name], PAIRS[name], "lora", tmp_path) < 1e-5


def test_graphs_of_two_exporters_are_compared_by_value(tmp_path: Path) -> None:
    assert extracted(PAIRS["optimum-vit"], PAIRS["dynamo-vit"], "light", tmp_path) < 1e-5
