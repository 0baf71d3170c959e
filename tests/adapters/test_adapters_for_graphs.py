# SPDX-License-Identifier: Apache-2.0
"""Adapters written for the slots of a graph, and read back: names, orientation, rank and type are the graph's.

https://github.com/microsoft/Olive/issues/2277: Olive's own adapter for a model of PEFT's has names that its graph by the
genai builder lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats import FitError
from surgery_formats.adapters.onnx_adapter.names import factor_pairs, match_modules
from tests.onnx.test_slots_of_golden_graphs import answered
from tests.support.graph_pairs import PAIRS, difference

LLAMA = PAIRS["olive-llama-slots"]
MODULES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def inputs_of(graph: Path) -> list[str]:
    return [one.name for one in onnx.load(graph, load_external_data=False).graph.input]


def slots_graph(path: Path, name: str, element: int = TensorProto.FLOAT, rank: Any = "r", **more: Any) -> Path:
    """A graph with inputs of factors alone, named as an exporter does; `rank` and what stands in for it."""
    turned, modules = more.pop("turned", False), more.pop("modules", MODULES)
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "down_proj": (64, 32)}
    inputs, nodes = [], []
    for layer in range(2):
        for part, projections in modules.items():
            for projection in projections:
                size = sizes.get(projection, (32, 64))
                stem = name.format(layer=layer, part=part, projection=projection)
                for side, own in (("A", (size[0], rank)), ("B", (rank, size[1]))):
                    inputs.append(
                        helper.make_tensor_value_info(stem.replace("?", side), element, own[::-1] if turned else own)
                    )
                    nodes.append(helper.make_node("Identity", [inputs[-1].name], [f"{inputs[-1].name} out"]))
    outputs = [helper.make_tensor_value_info(node.output[0], element, None) for node in nodes]
    model = helper.make_model(
        helper.make_graph(nodes, "slots", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(model, path)
    return path


def test_what_olive_takes_is_written_as_olive_writes_it(tmp_path: Path):
    out = tmp_path / "lora.onnx_adapter"
    result = surgery.convert(LLAMA.adapter("lora"), "onnx-adapter", graph=LLAMA.graph, output=out)
    assert not result.warnings
    ours, theirs = read_adapter_file(out), read_adapter_file(LLAMA.graph.with_name("adapter_weights.onnx_adapter"))
    assert set(ours) == set(theirs)
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) <= 1e-6
    expected = LLAMA.expected("lora")["outputs"]
    assert difference(answered(LLAMA.graph, LLAMA, out), expected) <= 1e-4


def test_an_adapter_of_olives_graph_becomes_pefts_again(tmp_path: Path):
    file = LLAMA.graph.with_name("adapter_weights.onnx_adapter")
    surgery.convert(file, "peft", base=LLAMA.base, output=tmp_path / "peft")
    surgery.merge(LLAMA.base, tmp_path / "peft", output=tmp_path / "merged")
    from safetensors.numpy import load_file

    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), LLAMA.expected("lora")
    weights = {name.removeprefix("weights."): one for name, one in expected.items() if name.startswith("weights.")}
    assert weights
    assert max(float(np.abs(merged[name] - one).max()) for name, one in weights.items()) <= 1e-6


@pytest.mark.parametrize("name", ["dynamo-llama", "mobius-llama", "genai-llama-int4", "script-unet"])
def test_our_slots_take_what_is_written_for_them(name: str, tmp_path: Path):
    pair = PAIRS[name]
    surgery.insert(pair.graph, pair.adapter("lora"), base=pair.base, output=tmp_path / "slots")
    graph, out = tmp_path / "slots" / "model.onnx", tmp_path / "again.onnx_adapter"
    surgery.convert(pair.adapter("lora"), "onnx-adapter", graph=graph, base=pair.base, output=out)
    made, again = read_adapter_file(tmp_path / "slots" / "adapters" / "lora.onnx_adapter"), read_adapter_file(out)
    assert set(again) == set(made) <= set(inputs_of(graph))
    for key, one in made.items():
        assert again[key].shape == one.shape
        assert np.allclose(again[key], one, atol=1e-6)
    if name != "script-unet":  # there is no base of this name to tell a convolution's rows
        surgery.convert(out, "peft", base=pair.base, output=tmp_path / "peft")


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("model.layers.{layer}.{part}.{projection}.lora_?.weight", TensorProto.FLOAT16),  # TensorRT Edge-LLM
        ("base_model.model.model.layers.{layer}.{part}.{projection}.lora_?.default.weight", TensorProto.FLOAT),  # torch
        ("model.layers.{layer}.attn.{projection}.lora_?.MatMul.weight", TensorProto.FLOAT),  # the genai builder
        ("layers.{layer}.{part}.{projection}.lora_?.weight", TensorProto.FLOAT),
    ],
)
def test_names_of_other_exporters(name: str, element: int, tmp_path: Path):
    graph = slots_graph(tmp_path / "model.onnx", name, element)
    out = tmp_path / "lora.onnx_adapter"
    surgery.convert(LLAMA.adapter("lora"), "onnx-adapter", graph=graph, output=out)
    arrays = read_adapter_file(out)
    assert set(arrays) == set(inputs_of(graph))
    assert {one.dtype for one in arrays.values()} == {
        np.dtype("float16" if element == TensorProto.FLOAT16 else "float32")
    }


def test_a_fixed_rank_is_filled_up_and_a_turned_factor_turned(tmp_path: Path):
    name = "model.layers.{layer}.{part}.{projection}.lora_?.weight"
    straight = slots_graph(tmp_path / "straight.onnx", name, rank=7)
    turned = slots_graph(tmp_path / "turned.onnx", name, rank=7, turned=True)
    files = [tmp_path / "straight.onnx_adapter", tmp_path / "turned.onnx_adapter"]
    for graph, file in zip((straight, turned), files, strict=True):
        surgery.convert(LLAMA.adapter("lora"), "onnx-adapter", graph=graph, output=file)
    one, other = map(read_adapter_file, files)
    assert one["model.layers.0.mlp.up_proj.lora_A.weight"].shape == (32, 7)
    assert not one["model.layers.0.mlp.up_proj.lora_A.weight"][:, 4:].any()
    for key, values in one.items():
        assert np.array_equal(values, other[key].T)
    small = slots_graph(tmp_path / "small.onnx", name, rank=2)
    with pytest.raises(FitError, match="has rank 4, and the graph's slot takes 2"):
        surgery.convert(LLAMA.adapter("lora"), "onnx-adapter", graph=small, output=tmp_path / "no.onnx_adapter")


def test_what_the_graph_has_no_slot_for_is_refused_or_left_out_by_choice(tmp_path: Path):
    head, base = LLAMA.adapter("head"), LLAMA.base
    with pytest.raises(FitError, match=r"lm_head.weight.*the graph has no slot for it"):
        surgery.convert(head, "onnx-adapter", graph=LLAMA.graph, base=base, output=tmp_path / "no.onnx_adapter")
    out = tmp_path / "part.onnx_adapter"
    result = surgery.convert(head, "onnx-adapter", graph=LLAMA.graph, base=base, output=out, allow_loss=True)
    assert any("12 of 14 slots stay empty" in text for text in result.warnings)
    assert len(read_adapter_file(out)) == 4


def test_slots_without_a_default_get_zeros(tmp_path: Path):
    graph = slots_graph(tmp_path / "model.onnx", "model.layers.{layer}.{part}.{projection}.lora_?.weight")
    out = tmp_path / "rs.onnx_adapter"
    result = surgery.convert(LLAMA.adapter("rslora"), "onnx-adapter", graph=graph, output=out)
    assert "10 of 14 slots stay empty" in result.warnings[-1]
    arrays = read_adapter_file(out)
    assert set(arrays) == set(inputs_of(graph))
    assert not arrays["model.layers.0.self_attn.q_proj.lora_A.weight"].any()
    assert arrays["model.layers.0.self_attn.k_proj.lora_A.weight"].any()


@pytest.mark.parametrize(
    ("graph", "why"),
    [("genai-llama", "the graph has no slots"), ("genai-llama-slots", "factors inside, and no inputs for others")],
)
def test_a_graph_without_slots_is_told_from_one_with_factors_inside(graph: str, why: str, tmp_path: Path):
    with pytest.raises(FitError, match=why):
        surgery.convert(
            LLAMA.adapter("lora"), "onnx-adapter", graph=PAIRS[graph].graph, output=tmp_path / "no.onnx_adapter"
        )


def test_a_graph_of_another_size_is_refused(tmp_path: Path):
    name = "model.layers.{layer}.self_attn.{projection}.lora_?.weight"
    graph = slots_graph(tmp_path / "m.onnx", name, modules={"x": ("q_proj", "k_proj", "v_proj", "gate_proj")})
    lora = LLAMA.adapter("rslora")  # of k_proj and o_proj
    with pytest.raises(FitError, match="no slot for it"):
        surgery.convert(lora, "onnx-adapter", graph=graph, output=tmp_path / "no.onnx_adapter")
    wrong = slots_graph(tmp_path / "w.onnx", name.replace("{projection}", "o_proj"), modules={"x": ("gate_proj",)})
    with pytest.raises(FitError, match=r"would be \[4, 32\].*takes \[rank, 64\]"):
        surgery.convert(lora, "onnx-adapter", graph=wrong, output=tmp_path / "no.onnx_adapter", allow_loss=True)


def test_modules_are_matched_where_that_is_certain():
    names = ["a.0.attn.q.lora_A.weight", "a.0.attn.q.lora_B.weight", "a.0.x.lora_A.weight", "a.lora_A.quant.weight"]
    assert factor_pairs(names) == [("a.0.attn.q.lora_A.weight", "a.0.attn.q.lora_B.weight")]
    assert match_modules(["l.0.attn.q"], ["l.0.self_attn.q"]) == {"l.0.self_attn.q": "l.0.attn.q"}
    two = ["enc.0.attn.q", "enc.0.cross.q"]
    assert match_modules(two, ["enc.0.other.q"]) == {}  # it may be either
