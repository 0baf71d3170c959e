# SPDX-License-Identifier: Apache-2.0
"""Branches that PEFT's own code leaves in a graph that torch traces, and the slots of our exports, folded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import surgery
from surgery_formats import NothingChangedError
from tests.onnx.test_slots_of_golden_graphs import answered
from tests.support.graph_pairs import PAIRS, Pair, difference

CLASSES = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).logits


def traced(pair: Pair, adapter: str, path: Path) -> Path:
    """PEFT's model with an adapter attached, as torch.onnx.export writes it."""
    model = CLASSES[pair.base_name].from_pretrained(pair.base, attn_implementation="eager")
    model.config.use_cache = False
    attached = PeftModel.from_pretrained(model, pair.adapter(adapter)).eval()
    run = pair.run()
    inputs = tuple(torch.tensor(run[f"inputs.{name}"]) for name in ("input_ids", "attention_mask"))
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(attached).eval(), inputs, str(path), dynamo=False, opset_version=17, **names)
    return path


@pytest.mark.parametrize(
    ("name", "adapter"), [("script-llama", "lora"), ("script-llama", "head"), ("script-bert", "lora")]
)
def test_what_torch_traced_of_pefts_model_is_folded(name: str, adapter: str, tmp_path: Path):
    pair = PAIRS[name]
    graph = traced(pair, adapter, tmp_path / "traced" / "model.onnx")
    expected = pair.expected(adapter)["outputs"]
    assert difference(answered(graph, pair), expected) <= 1e-5
    result = surgery.fold(graph, output=tmp_path / "folded")
    folded = tmp_path / "folded" / "model.onnx"
    assert difference(answered(folded, pair), expected) <= 1e-5
    assert {rank for _, _, rank in result.folded} == {4}
    left = onnx.load(folded).graph
    assert not [one.name for one in left.initializer if "lora" in one.name]
    assert result.removed >= 3 * len(result.folded)


def test_a_dora_is_no_branch_and_stays(tmp_path: Path):
    pair = PAIRS["script-bert"]
    graph = traced(pair, "dora", tmp_path / "traced" / "model.onnx")
    with pytest.raises(NothingChangedError, match="no branch of a LoRA"):
        surgery.fold(graph, output=tmp_path / "folded")


@pytest.mark.parametrize("target", ["cpu", "portable", "cuda"])
def test_slots_of_our_exports_are_folded(target: str, tmp_path: Path):
    pair = PAIRS["script-llama"]
    kept = {"target": target, "dtype": "fp32"}
    surgery.export_onnx(pair.base, output=tmp_path / "slots", swap=pair.adapter("lora"), **kept)
    file = tmp_path / "slots" / "adapters" / "lora.onnx_adapter"
    surgery.fold(tmp_path / "slots", file, output=tmp_path / "folded")
    ids = pair.run()["inputs.input_ids"].tolist()
    surgery.export_onnx(pair.base, pair.adapter("lora"), output=tmp_path / "merged", **kept)
    tokens = [
        [text.tokens for text in surgery.run(folder, ids, max_new=6, device="cpu").texts]
        for folder in (tmp_path / "folded", tmp_path / "merged")
    ]
    assert tokens[0] == tokens[1]
    expected = pair.expected("lora")["outputs"]
    if target != "cuda":
        assert difference(answered(tmp_path / "folded" / "model.onnx", pair), expected) <= 1e-4


def test_slots_go_into_our_exports_too(tmp_path: Path):
    pair = PAIRS["script-llama"]
    surgery.export_onnx(pair.base, output=tmp_path / "plain", dtype="fp32")
    surgery.insert(tmp_path / "plain" / "model.onnx", pair.adapter("lora"), base=pair.base, output=tmp_path / "slots")
    expected = pair.expected("lora")["outputs"]
    graph, file = tmp_path / "slots" / "model.onnx", tmp_path / "slots" / "adapters" / "lora.onnx_adapter"
    assert difference(answered(graph, pair, file), expected) <= 1e-4
    ids = pair.run()["inputs.input_ids"].tolist()
    surgery.export_onnx(pair.base, pair.adapter("lora"), output=tmp_path / "merged", dtype="fp32")
    tokens = [
        [text.tokens for text in surgery.run(folder, ids, max_new=6, adapters=adapters).texts]
        for folder, adapters in ((tmp_path / "slots", [file]), (tmp_path / "merged", []))
    ]
    assert tokens[0] == tokens[1]
