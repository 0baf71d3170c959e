# SPDX-License-Identifier: Apache-2.0
"""Experts of stored weights in one com.microsoft.MoE: the files stay as they are, and the logits are the model's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.verify import verify
from surgery_formats.errors import FitError, ProofError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
MODELS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "qwen2_moe", "deepseek_v2")


def _operators(out):
    return [node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("name", MODELS)
def test_one_operator_over_weights_where_they_lie(name, tmp_path):
    kept = torch.bfloat16 if name in ("qwen3_moe", "gpt_oss") else torch.float32
    base, out = recipes.build(name, tmp_path / "base", dtype=kept), tmp_path / "out"
    export_onnx(base, output=out, experts="fused")
    assert _operators(out).count("MoE") == (1 if name == "deepseek_v2" else 2)
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    expected = trained.logits(recipes.load(name, base).float(), IDS)
    assert np.abs(Plain(out / "model.onnx").step(IDS, np.ones_like(IDS)) - expected).max() <= TOLERANCE
    verify(out, against=base)


def test_a_merged_adapter_of_experts_goes_in(tmp_path):
    base = recipes.build("gpt_oss", tmp_path / "base")
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = trained.train("gpt_oss", base, trained._lora(target_modules=[], **fields), tmp_path / "adapter")
    expected = trained.logits(trained.attached("gpt_oss", base, (adapter, 1.0)), IDS)
    export_onnx(base, [adapter], output=tmp_path / "out", experts="fused")
    assert np.abs(Plain(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS)) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("fault", ["exchanged", "not in turn"])
def test_an_expert_in_another_ones_place_is_found(fault, tmp_path):
    export_onnx(recipes.build("mixtral", tmp_path / "base"), output=tmp_path / "out", experts="fused")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    joined = next(node for node in model.graph.node if node.op_type == "Concat" and "experts" in node.input[0])
    if fault == "exchanged":
        joined.input[0], joined.input[2] = joined.input[2], joined.input[0]
    else:
        turn = next(
            node for node in model.graph.node if node.op_type == "Transpose" and node.attribute[0].ints[:1] == [0]
        )
        turn.attribute[0].ints[:] = [0, 1, 2, 3]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ProofError):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("llama", {}, "the model has no experts"),
        ("mixtral", {"target": "cuda", "dtype": "fp16"}, "the target cuda has no operator"),
        ("mixtral", {"opset": 17}, "older runtimes have no operator"),
        ("deepseek_v3", {}, "no layer has experts that one operator computes exactly"),
        ("mixtral", {"weights_type": "int8"}, "no layer has experts that one operator computes exactly"),
        ("mixtral", {"linear": "matmul"}, "no layer has experts that one operator computes exactly"),
    ],
)
def test_what_no_operator_computes_is_refused(name, options, fault, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    with pytest.raises(FitError, match=fault):
        export_onnx(base, output=tmp_path / "out", experts="fused", **options)


def test_by_default_stored_experts_are_apart(tmp_path):
    export_onnx(recipes.build("mixtral", tmp_path / "base"), output=tmp_path / "out")
    assert "MoE" not in _operators(tmp_path / "out")
