# SPDX-License-Identifier: Apache-2.0
"""Codes of experts: one by one or stacked, a product each or all of a layer in one QMoE, compute what they stand for."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.verify import verify
from surgery_formats.errors import ProofError
from tests.oracles import recipes
from tests.support import trained
from tests.support.block_codes import decoded
from tests.support.published import published_gpt_oss
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CODED = {  # one by one, weights normalised or not; stacked; stacked with rows that are inputs, and biases
    "mixtral": {"intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 64, "norm_topk_prob": False},
    "olmoe": {"intermediate_size": 64},
    "granitemoe": {"intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64, "num_local_experts": 3},
}
ROUTED = {  # scores of sigmoids with a correction; the best groups only, with a factor; a floor under the sum
    "deepseek_v3": {"moe_intermediate_size": 64},
    "deepseek_v2_groups": {"moe_intermediate_size": 64},
    "ernie4_5_moe": {"moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64},
}


def _built(name, tmp_path):
    return recipes.build(name, tmp_path / "base", hidden_size=64, **{**CODED, **ROUTED}[name])


def _operators(out):
    return [node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node]


def _of_what_codes_stand_for(name, base, out, folder):
    """Transformers' model of the values of all codes."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    for key, values in decoded(out).items():
        sizes = tensors[key].shape
        turned = name == "gpt_oss" and ".experts." in key
        rows = torch.from_numpy(values).reshape(*((sizes[0], sizes[2], sizes[1]) if turned else sizes))
        tensors[key] = (rows.mT if turned else rows).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return recipes.load(name, folder)


@pytest.mark.parametrize("name", CODED)
def test_one_operator_computes_the_experts_of_a_layer(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    result = export_onnx(
        base, output=out, weights_type="int4", symmetric=name in ("mixtral", "granitemoe"), head="keep"
    )
    coded = [tensor.weight for tensor, _ in result.ledger.coded if ".self_attn." not in tensor.weight]
    assert len(coded) == 2 * (1 + {"mixtral": 15, "qwen3_moe": 15, "olmoe": 18}.get(name, 2))
    expected = trained.logits(_of_what_codes_stand_for(name, base, out, tmp_path / "values"), IDS)
    assert np.abs(expected - trained.logits(recipes.load(name, base), IDS)).max() > 0.01
    assert _operators(out).count("QMoE") == 2
    assert "TopK" not in _operators(out)
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    verify(out, against=base)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss"])
def test_elsewhere_each_expert_has_products_of_its_own(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    export_onnx(base, output=out, target="portable", weights_type="int4", symmetric=name != "gpt_oss", head="keep")
    expected = trained.logits(_of_what_codes_stand_for(name, base, out, tmp_path / "values"), IDS)
    plain = Plain(out / "model.onnx")
    found = plain.session.run(["logits"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past})[0]
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    assert "QMoE" not in _operators(out)
    verify(out, against=base)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_experts_of_fp8(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    export_onnx(base, output=out, weights_type="fp8", head="keep")
    expected = trained.logits(_of_what_codes_stand_for(name, base, out, tmp_path / "values"), IDS)
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    assert "QMoE" not in _operators(out)
    verify(out, against=base)


@pytest.mark.parametrize("name", ROUTED)
def test_one_operator_with_every_way_to_choose(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4")
    assert "QMoE" in _operators(out)
    verify(out, against=base)


@pytest.mark.parametrize(
    "options",
    [
        {"weights_type": "int8"},
        {"target": "cuda", "dtype": "fp16"},
        {"experts": "apart"},
        {"opset": 17},
        {"block": 128},
        {"block": 64, "symmetric": False},
        {"weights_type": "mixed", "budget": 1 << 18},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_the_operator_would_not_compute_exactly_or_not_everywhere(options, tmp_path):
    """8 bits, other providers and older runtimes; blocks that a row does not fill, and zero points of rows of one block."""
    base = _built("mixtral", tmp_path)
    export_onnx(base, output=tmp_path / "out", **{"weights_type": "int4", **options})
    assert "QMoE" not in _operators(tmp_path / "out")
    assert "MatMulNBits" in _operators(tmp_path / "out")


def test_runtimes_that_are_slow_or_wrong_refuse_the_operator(tmp_path):
    """Before onnxruntime 1.31 QMoE takes 5 to 50 times as long on a CPU, and 1.23 is wrong for blocks of 64."""
    export_onnx(_built("mixtral", tmp_path), output=tmp_path / "out", weights_type="int4")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    attributes = [{one.name for one in node.attribute} for node in graph.node if node.op_type == "QMoE"]
    assert all(
        {"accuracy_level", "weights_prepacked"} <= names for names in attributes
    )  # 1.31 knows these, 1.30 one, 1.27 none


def test_where_experts_have_slots_each_is_by_itself(tmp_path):
    base = _built("mixtral", tmp_path)
    adapter = trained.train("mixtral", base, trained._lora(target_modules=[], **EXPERTS), tmp_path / "adapter")
    export_onnx(base, swap=[adapter], output=tmp_path / "out", weights_type="int4")
    assert "QMoE" not in _operators(tmp_path / "out")
    verify(tmp_path / "out", against=base)
    attention = trained.train("mixtral", base, trained._lora(target_modules=["q_proj"]), tmp_path / "attention")
    export_onnx(base, swap=[attention], output=tmp_path / "other", weights_type="int4")
    assert _operators(tmp_path / "other").count("QMoE") == 2
    verify(tmp_path / "other", against=base)


def test_codes_of_merged_experts_and_in_one_file(tmp_path):
    base = _built("gpt_oss", tmp_path)
    adapter = trained.train("gpt_oss", base, trained._lora(target_modules=[], **EXPERTS), tmp_path / "adapter")
    expected = trained.logits(trained.attached("gpt_oss", base, (adapter, 1.0)), IDS)
    out = tmp_path / "out"
    export_onnx(base, [adapter], output=out, weights_type="int8", head="keep", weights="embed")
    moved = np.abs(expected - trained.logits(recipes.load("gpt_oss", base), IDS)).max()
    assert np.abs(Plain(out / "model.onnx").step(IDS, np.ones_like(IDS)) - expected).max() <= 0.1 * moved
    verify(out, against=base, adapters=[adapter])
    with pytest.raises(ProofError, match="its codes are off"):
        verify(out, against=base)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_one_operator_and_one_file(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4", weights="embed", symmetric=False)
    assert "QMoE" in _operators(out)
    assert not list(out.glob("*.safetensors"))
    verify(out, against=base)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_an_expert_in_another_ones_place_is_found(name, tmp_path):
    base, out = _built(name, tmp_path), tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4", experts="apart")
    path = out / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if any(part.endswith((".1.codes", ".2.codes")) for part in node.input)]
    first, second = (next(node for node in nodes if f".{number}." in node.input[1]) for number in (1, 2))
    first.input[1], second.input[1] = second.input[1], first.input[1]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ProofError):
        verify(out)


@pytest.mark.parametrize("fault", ["experts exchanged", "not in turn", "another layer's", "in the file"])
def test_experts_in_wrong_places_of_one_operator_are_found(fault, tmp_path):
    base, out = _built("mixtral", tmp_path), tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4")
    path = out / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "QMoE")
    down = next(one for one in model.graph.initializer if one.name == node.input[5])
    places = {one.key: one for one in down.external_data}
    begin, length = (int(places[key].value) for key in ("offset", "length"))
    if fault == "not in turn":
        for turn in (
            node for node in model.graph.node if node.op_type == "Transpose" and node.attribute[0].ints[:1] == [0]
        ):
            turn.attribute[0].ints[:] = [0, 1, 2, 3]
    elif fault == "another layer's":
        other = next(node for node in reversed(model.graph.node) if node.op_type == "QMoE")
        node.input[5], other.input[5] = other.input[5], node.input[5]
    elif fault == "experts exchanged":  # all one place on
        del down.external_data[:]
        down.data_location = onnx.TensorProto.DEFAULT
        raw = (out / "quantised.safetensors").read_bytes()[begin : begin + length]
        each = length // 5
        down.raw_data = raw[each:] + raw[:each]
    path.write_bytes(model.SerializeToString())
    if fault == "in the file":
        raw = bytearray((out / "quantised.safetensors").read_bytes())
        each = length // 5
        raw[begin : begin + each], raw[begin + each : begin + 2 * each] = (
            raw[begin + each : begin + 2 * each],
            raw[begin : begin + each],
        )
        (out / "quantised.safetensors").write_bytes(raw)
        for manifest in out.glob("*manifest*"):
            manifest.unlink()
    with pytest.raises(ProofError, match="its codes are off" if fault == "in the file" else None):
        verify(out, against=base if fault == "in the file" else None)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_one_expert_of_many_in_another_ones_place_is_found_without_a_manifest(kind, tmp_path):
    """Of twenty experts two make a third of the whole stack's norm: each is compared by itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 20, "num_hidden_layers": 1}
    base, out = recipes.build("granitemoe", tmp_path / "base", **sizes), tmp_path / "out"
    export_onnx(base, output=out, weights_type=kind)
    (out / "surgery_manifest.json").unlink()
    verify(out, against=base)
    path = out / "quantised.safetensors"
    raw = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data])
    begin, end = next(
        entry["data_offsets"] for name, entry in header.items() if name.endswith("output_linear.weight.codes")
    )
    stack = np.frombuffer(raw, np.uint8)[data + begin : data + end].reshape(20, -1)
    stack[[3, 7]] = stack[[7, 3]]
    path.write_bytes(raw)
    with pytest.raises(ProofError, match="its codes are off"):
        verify(out, against=base)


def test_codes_of_8_bits_hold_mxfp4(tmp_path):
    base = published_gpt_oss(tmp_path / "base")
    exact = export_onnx(base, output=tmp_path / "int8", weights_type="int8", head="keep")
    errors = {tensor.weight: error.relative for tensor, error in exact.ledger.coded}
    experts = [error for name, error in errors.items() if ".experts." in name]
    assert len(experts) == 4
    assert max(experts) == 0
    assert min(error for name, error in errors.items() if ".experts." not in name) > 0
    assert not any("rounded a second time" in text for text in exact.warnings)
    verify(tmp_path / "int8", against=base)
    rounded = export_onnx(base, output=tmp_path / "int4", weights_type="int4")
    assert any("4 weights of MXFP4 are rounded a second time" in text for text in rounded.warnings)
    verify(tmp_path / "int4", against=base)
