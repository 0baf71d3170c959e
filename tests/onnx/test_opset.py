# SPDX-License-Identifier: Apache-2.0
"""Graphs need no newer set of operators than their nodes, and are the same model in an older one."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.lower import lower
from surgery.onnx.graph.opset import NEWEST, OLDEST, ir_version, least_opset, needs
from surgery.onnx.graph.target import TARGETS, twin
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes
from tests.support.checked_graphs import check_graph
from tests.support.sessions import Plain

LEAST = {"llama": 18, "gpt2": 20, "gemma2": 20, "qwen2": 18}  # of the cpu target's main graph
OWN = ("SimplifiedLayerNormalization",)  # onnxruntime's, in ONNX's domain


def graphs(name, folder, target, opset=None, io=DType.F32, **fields):
    source = recipes.build(name, folder / name, **fields)
    options = GraphOptions(twin(TARGETS[target]), io, opset=opset)
    built = build(open_checkpoint(source).main, options)
    return source, {file: graph.unpacked() for file, graph in built.graphs.items()}


def stamped(model):
    return next(one.version for one in model.opset_import if one.domain == "")


def of_onnx(model):
    return [node for node in model.graph.node if node.domain == "" and node.op_type not in OWN]


@pytest.mark.parametrize("name", LEAST)
def test_a_graph_is_stamped_with_what_its_nodes_need(name, tmp_path):
    wide = {"hidden_size": 64} if name in ("llama", "qwen2") else {}  # heads that GroupQueryAttention rotates itself
    _, made = graphs(name, tmp_path, "cpu", **wide)
    model = made["model.onnx"]
    assert stamped(model) == LEAST[name]
    assert model.ir_version == ir_version(LEAST[name]) < 11
    for node in of_onnx(model):
        assert onnx.defs.get_schema(node.op_type, LEAST[name], "").since_version <= LEAST[name]
    assert stamped(made["prefill.onnx"]) == NEWEST


def test_the_versions_of_ir_are_those_of_onnx():
    first = {opset: ir for _, ir, opset, *_ in reversed(onnx.helper.VERSION_TABLE)}
    assert {opset: ir_version(opset) for opset in range(OLDEST, NEWEST + 1)} == {
        opset: first[opset] for opset in range(OLDEST, NEWEST + 1)
    }


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "phi3", "stablelm"])
def test_the_graph_of_an_older_set_is_the_same_model(name, target, tmp_path):
    found = []
    for opset in (None, OLDEST):
        source, made = graphs(name, tmp_path / str(opset), target, opset)
        path = source / f"{opset}.onnx"
        path.write_bytes(made["prefill.onnx" if target == "cpu" else "model.onnx"].SerializeToString())
        if opset is not None:
            assert {stamped(model) for model in made.values()} == {opset}
            assert all(needs(node) <= opset for model in made.values() for node in model.graph.node)
            check_graph(path)
        graph = Plain(path, 2)
        mask = np.ones((2, 6), np.int64)
        mask[1, :2] = 0  # padded on the left
        found += [graph.step(np.arange(12).reshape(2, 6) % 50 + 3, mask)]
        found += [graph.step(np.array([[7], [9]]), np.concatenate([mask, np.ones((2, 1), np.int64)], 1))]
    seen = mask.astype(bool)
    assert np.abs(found[0] - found[2])[seen].max() < 1e-4
    assert np.abs(found[1] - found[3]).max() < 1e-4


@pytest.mark.parametrize("name", recipes.ENCODERS)
def test_an_encoder_of_an_older_set_is_the_same_model(name, tmp_path):
    found = []
    for opset in (None, OLDEST):
        source, made = graphs(name, tmp_path / str(opset), "cpu", opset)
        path = source / f"{opset}.onnx"
        path.write_bytes(made["model.onnx"].SerializeToString())
        session = onnxruntime.InferenceSession(path)
        ids = np.array([[5, 17, 33, 9], [8, 7, 1, 1]])
        feed = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), "token_type_ids": ids * 0}
        asked = {port.name for port in session.get_inputs()}
        found.append(session.run(None, {key: value for key, value in feed.items() if key in asked})[0])
    rows = found[0].ndim == 3
    assert np.abs(found[0] - found[1])[0].max() < 1e-4
    assert np.abs(found[0] - found[1])[1, : 2 if rows else None].max() < 1e-4


@pytest.mark.parametrize("fields", [{}, {"num_heads": 2}, {"num_heads": 2, "rotary_embedding_dim": 4}])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("opset", [17, 22])
def test_rotary_positions_in_steps(fields, interleaved, opset):
    shape = [2, 3, 16] if "num_heads" in fields else [2, 2, 3, 8]
    dims = fields.get("rotary_embedding_dim", 8)
    x = np.random.default_rng(0).normal(size=shape).astype("f4")
    found = []
    for lowered in (False, True):
        graph = Graph()
        graph.input("x", DType.F32, shape)
        tables = [graph.constant(np.random.default_rng(n).normal(size=(9, dims // 2)).astype("f4")) for n in (1, 2)]
        graph.input("places", DType.I64, (2, 3))
        graph.node("RotaryEmbedding", ["x", *tables, "places"], "", out="y", interleaved=interleaved, **fields)
        graph.output("y", DType.F32, shape)
        if lowered:
            lower(graph, opset, DType.F32)
        session = onnxruntime.InferenceSession(graph.model({}, least_opset(graph.proto)).SerializeToString())
        found += session.run(None, {"x": x, "places": np.array([[0, 3, 2], [5, 8, 1]])})
    assert np.abs(found[0] - found[1]).max() < 1e-6


def test_a_mask_of_numbers_is_added():
    found = []
    draw = np.random.default_rng(0)
    feed = {name: draw.normal(size=(1, 4, 8)).astype("f4") for name in "qkv"} | {
        "bias": draw.normal(size=(1, 2, 4, 4)).astype("f4")
    }
    for lowered in (False, True):
        graph = Graph()
        for name, value in feed.items():
            graph.input(name, DType.F32, value.shape)
        graph.node("Attention", list(feed), "", out="y", q_num_heads=2, kv_num_heads=2, scale=0.3)
        graph.output("y", DType.F32, (1, 4, 8))
        if lowered:
            lower(graph, OLDEST, DType.F32)
        session = onnxruntime.InferenceSession(graph.model({}, least_opset(graph.proto)).SerializeToString())
        found += session.run(None, feed)
    assert np.abs(found[0] - found[1]).max() < 1e-6


@pytest.mark.parametrize("kind", ["bool", "least", "infinite"])
@pytest.mark.parametrize(("io", "tolerance"), [(DType.F32, 1e-6), (DType.F16, 4e-3)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_a_query_that_sees_nothing_has_a_result_of_zero(kind, io, tolerance, cap):
    """With a mask of -inf Softmax made NaN of it, which the next layer's keys and values carry to others."""
    draw, found = np.random.default_rng(0), []
    own = "f4" if io is DType.F32 else "f2"
    seen = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)[None, None]
    hidden = np.finfo(own).min if kind == "least" else -np.inf
    mask = seen if kind == "bool" else np.where(seen, 0.5, hidden).astype(own)
    feed = {"q": draw.normal(size=(2, 3, 16)), "k": draw.normal(size=(2, 3, 8)), "v": draw.normal(size=(2, 3, 8))}
    feed = {name: value.astype(own) for name, value in feed.items()}
    for lowered in (False, True):
        graph = Graph()
        for name, value in feed.items():
            graph.input(name, io, value.shape)
        graph.input("mask", DType.BOOL if kind == "bool" else io, mask.shape)
        graph.node(
            "Attention", ["q", "k", "v", "mask"], "", out="y", q_num_heads=2, kv_num_heads=1, scale=0.3, softcap=cap
        )
        graph.output("y", io, (2, 3, 16))
        if lowered:
            lower(graph, OLDEST, io)
        session = onnxruntime.InferenceSession(graph.model({}, least_opset(graph.proto, io)).SerializeToString())
        found += session.run(None, {**feed, "mask": mask})
    assert not found[1][:, 1].any()
    assert np.abs(found[0] - found[1]).max() <= tolerance


def test_what_an_older_set_cannot_hold_is_refused(tmp_path):
    for opset in (OLDEST - 1, NEWEST + 1):
        with pytest.raises(FitError, match=f"opset {OLDEST} to {NEWEST}, not {opset}"):
            graphs("llama", tmp_path / str(opset), "cpu", opset)
    graph = Graph()
    graph.input("x", DType.F32, (1, 4))
    graph.node("Attention", ["x", "x", "x"], "", out="y", q_num_heads=2, kv_num_heads=2, is_causal=1)
    with pytest.raises(FitError, match="this form of Attention needs opset 23"):
        lower(graph, OLDEST, DType.F32)
