# SPDX-License-Identifier: Apache-2.0
"""A built graph is its bytes alone: messages and what built them are ten times as large, and an export builds several."""

from __future__ import annotations

import gc

import pytest

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.target import TARGETS, twin
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes


@pytest.mark.parametrize("name", ["llama", "bert_sequence", "t5", "gpt_oss"])
def test_nothing_that_built_a_graph_waits_for_the_garbage_collector(name, tmp_path):
    component = open_checkpoint(recipes.build(name, tmp_path / "base")).main
    gc.collect()
    gc.disable()
    try:
        built = build(component, GraphOptions(twin(TARGETS["cpu"]), DType.F32))
        left = [one for one in gc.get_objects() if type(one) in (Context, Graph)]
    finally:
        gc.enable()
    assert left == []
    assert all(isinstance(graph.data, bytes) for graph in built.graphs.values())


def test_a_graph_unpacks_to_what_was_packed_each_time_anew(tmp_path):
    component = open_checkpoint(recipes.build("llama", tmp_path / "base")).main
    graph = build(component, GraphOptions(twin(TARGETS["cpu"]), DType.F32)).graphs["model.onnx"]
    first = graph.unpacked()
    assert first.SerializeToString(deterministic=True) == graph.data
    del first.graph.node[:]
    assert graph.unpacked().graph.node
