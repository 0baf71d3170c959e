# SPDX-License-Identifier: Apache-2.0
"""A LoRA classifier of PEFT's in graphs that others made: its head comes in by the same file as its LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats import FitError
from tests.onnx.test_slots_of_golden_graphs import answered
from tests.support.graph_pairs import PAIRS, difference

GRAPHS = [
    name for name, pair in PAIRS.items() if pair.base_name == "bert" and pair.dtype == "float32" and "fused" not in name
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What PEFT saves for a sequence classifier, trained a little, and its answer."""
    pair = PAIRS[GRAPHS[0]]
    model = BertForSequenceClassification.from_pretrained(pair.base, attn_implementation="eager")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("classifier") / "sst"
    peft.save_pretrained(folder)
    inputs = {name.removeprefix("inputs."): torch.tensor(one) for name, one in pair.run().items() if name != "outputs"}
    with torch.no_grad():
        return folder, peft(**inputs).logits.numpy()


@pytest.mark.parametrize("name", GRAPHS)
def test_a_head_is_an_optional_input_beside_the_slots(name: str, classifier: tuple[Path, Any], tmp_path: Path):
    (folder, expected), pair = classifier, PAIRS[name]
    result = surgery.insert(pair.graph, folder, base=pair.base, output=tmp_path / "out")
    graph, file = tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "sst.onnx_adapter"
    assert (len(result.slots), len(result.replaced)) == (4, 2)
    assert set(result.replaced) < set(read_adapter_file(file))
    assert answered(graph, pair).tobytes() == answered(pair.graph, pair).tobytes()
    assert difference(answered(graph, pair, file), expected) <= 1e-5
    ids = pair.run()["inputs.input_ids"].tolist()
    runs = [surgery.run(graph, ids, adapters=files).arrays for files in ([], [file])]
    plain, active = (next(iter(arrays.values())) for arrays in runs)
    assert difference(active, expected) <= 1e-5
    assert difference(plain, pair.run()["outputs"]) <= 1e-5

    surgery.fold(graph, file, output=tmp_path / "folded")
    assert difference(answered(tmp_path / "folded" / "model.onnx", pair), expected) <= 1e-5


def test_what_is_given_in_full_has_no_strength_and_is_not_required(classifier: tuple[Path, Any], tmp_path: Path):
    pair = PAIRS[GRAPHS[0]]
    for option, why in (("gated", "it has no strength"), ("required", "base's values as default")):
        with pytest.raises(FitError, match=why):
            surgery.insert(pair.graph, classifier[0], base=pair.base, output=tmp_path / "out", **{option: True})
