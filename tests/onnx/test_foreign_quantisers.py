# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's own quantisers find what they look for in graphs of MatMul, on every target."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import UsageError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain, feed_encoder, open_session

onnxruntime.set_default_logger_severity(3)
quantisation = pytest.importorskip("onnxruntime.quantization")
IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
WIDE = {"hidden_size": 64, "intermediate_size": 96}
LINEAR = {"qwen2": 3 * 7 + 1, "gpt2": 3 * 4 + 1, "bert_sequence": 3 * 6 + 2}


def kinds(path):
    graph = onnx.load(path, load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


def answers(name, path):
    mask = np.ones_like(IDS)
    if "bert" not in name:
        return Plain(path).step(IDS, mask)
    return feed_encoder(open_session(path)[0], IDS, mask)["logits"]


@pytest.mark.parametrize("target", ["cuda", "cpu", "portable"])
@pytest.mark.parametrize("name", LINEAR)
def test_quantisers_take_every_linear_map(name, target, tmp_path):
    fields = {"n_embd": 64} if name == "gpt2" else WIDE
    base = recipes.build(name, tmp_path / "base", dtype=torch.bfloat16, **fields)
    out = tmp_path / "out"
    export_onnx(base, output=out, linear="matmul", target=target, dtype="fp32")
    count = kinds(out / "model.onnx")
    assert (count["Gemm"], count["FusedMatMul"]) == (0, 0)
    surgery.verify(out, against=base)
    expected = answers(name, out / "model.onnx")
    quantisation.quantize_dynamic(out / "model.onnx", out / "int8.onnx", weight_type=quantisation.QuantType.QInt8)
    assert kinds(out / "int8.onnx")["MatMulInteger"] == LINEAR[name]
    dynamic = answers(name, out / "int8.onnx")
    assert np.abs(dynamic - expected).max() < 0.15 * np.abs(expected).max()
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    constants = {one.name: len(one.dims) for one in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and constants.get(node.input[1]) == 2]
    assert len(products) == LINEAR[name]  # what MatMulNBitsQuantizer takes; benchmarks/quantised_graphs.py runs it


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["qwen2", "bert_sequence"])
def test_told_what_to_take_quantize_dynamic_takes_every_gemm(name, target, tmp_path):
    """As docs/quantised-graphs.md has it, for graphs that were exported without the option."""
    out = tmp_path / "out"
    export_onnx(recipes.build(name, tmp_path / "base", **WIDE), output=out, target=target)
    expected = answers(name, out / "model.onnx")
    quantisation.quantize_dynamic(
        out / "model.onnx",
        out / "int8.onnx",
        weight_type=quantisation.QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    assert kinds(out / "int8.onnx")["MatMulInteger"] == kinds(out / "model.onnx")["Gemm"] > 0
    assert np.abs(answers(name, out / "int8.onnx") - expected).max() < 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["qwen3", "opt_350m", "granite", "gpt_neox", "gemma2", "mixtral"])
def test_graphs_of_matmul_are_transformers(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", linear="matmul")
    found = Plain(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS))
    with torch.no_grad():
        expected = recipes.load(name, base)(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-4
    surgery.verify(tmp_path / "out", against=base)


def test_adapters_are_merged_and_swapped_in_graphs_of_matmul(tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    adapter = trained.train("llama", base, trained.MERGED["dora"], tmp_path / "dora")
    lora = trained.train("llama", base, trained.MERGED["lora all-linear"], tmp_path / "lora", seed=5)
    out = tmp_path / "out"
    export_onnx(base, [adapter], swap=[lora], output=out, linear="matmul")
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    expected = trained.logits(trained.attached("llama", base, (adapter, 1.0)), IDS)
    assert np.abs(found - expected).max() <= 1e-4
    surgery.verify(out, against=base, adapters=[adapter])


def test_codes_are_no_matmul(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="a product of their own"):
        export_onnx(base, output=tmp_path / "out", linear="matmul", weights_type="int4")
