# SPDX-License-Identifier: Apache-2.0
"""LoRAs that a graph adds by itself are told of: weights found by value do not show them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import surgery
from surgery.onnx.fold.standing import standing_branches
from surgery_formats.containers.onnx import open_graph
from surgery_formats.errors import ProofError
from tests.support.graph_pairs import PAIRS
from tests.support.graphs_by_value import base_of, graph_of, initializer

BUILT_IN = PAIRS["genai-llama-slots"]
TOLD = "the graph itself adds LoRAs to 14 weights"


def test_verify_does_not_pass_a_graph_with_an_adapter_in_it_as_its_base(tmp_path: Path):
    for adapters in ((), BUILT_IN.adapter("lora")):
        with pytest.raises(ProofError, match=TOLD):
            surgery.verify(BUILT_IN.graph, against=BUILT_IN.base, adapters=adapters)
    surgery.fold(BUILT_IN.graph, output=tmp_path / "folded")
    checks = surgery.verify(tmp_path / "folded", against=BUILT_IN.base, adapters=BUILT_IN.adapter("lora")).checks
    assert any("14 of these updated" in check.detail for check in checks)


def test_a_merge_and_an_insertion_say_that_the_adapter_stays(tmp_path: Path):
    adapter, base = BUILT_IN.adapter("lora"), BUILT_IN.base
    merged = surgery.merge(BUILT_IN.graph, adapter, graph_of=base, output=tmp_path / "merged")
    inserted = surgery.insert(BUILT_IN.graph, adapter, base=base, output=tmp_path / "inserted")
    located = surgery.locate(BUILT_IN.graph, base=base)
    assert all(any(TOLD in one for one in result.warnings) for result in (merged, inserted, located))
    plain = PAIRS["genai-llama"]
    assert not any("LoRA" in one for one in surgery.merge(plain.graph, adapter, graph_of=base, dry_run=True).warnings)


@pytest.mark.parametrize("gated", [False, True])
def test_slots_and_strengths_are_inputs_and_no_part_of_the_graph(gated: bool, tmp_path: Path):
    pair = PAIRS["script-llama"]
    surgery.insert(pair.graph, pair.adapter("lora"), base=pair.base, output=tmp_path / "out", gated=gated)
    graph = next((tmp_path / "out").glob("*.onnx"))
    assert not standing_branches(open_graph(graph))
    assert surgery.verify(graph, against=pair.base).checks


def low_rank(tmp_path: Path, **factors: np.ndarray) -> Path:
    """``y = x W + (x A) B``."""
    rng = np.random.default_rng(5)
    weights = {"w": rng.standard_normal((48, 40))} | factors
    tensors = [initializer(name, value.astype(np.float32)) for name, value in weights.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wide"], "wide"),
        helper.make_node("MatMul", ["x", "a"], ["down"], "down"),
        helper.make_node("MatMul", ["down", "b"], ["up"], "up"),
        helper.make_node("Add", ["wide", "up"], ["y"], "sum"),
    ]
    return graph_of(tmp_path / "model.onnx", tensors, nodes)


def test_small_products_of_the_base_itself_are_no_adapter(tmp_path: Path):
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((48, 6)).astype(np.float32), rng.standard_normal((6, 40)).astype(np.float32)
    path = low_rank(tmp_path, a=a, b=b)
    wide = onnx.numpy_helper.to_array(next(one for one in onnx.load(path).graph.initializer if one.name == "w"))
    whole = base_of(tmp_path / "whole", {"l.weight": wide.T, "l.down.weight": a.T, "l.up.weight": b.T})
    assert surgery.verify(path, against=whole).checks
    alone = base_of(tmp_path / "alone", {"l.weight": wide.T})
    with pytest.raises(ProofError, match="adds a LoRA to 1 weight, which makes another model"):
        surgery.verify(path, against=alone)


def test_factors_that_add_nothing_are_not_told_of(tmp_path: Path):
    a = np.random.default_rng(7).standard_normal((48, 6))
    assert not standing_branches(open_graph(low_rank(tmp_path, a=a, b=np.zeros((6, 40)))))
