# SPDX-License-Identifier: Apache-2.0
"""LoRA on every linear layer of each decoder: merged, and in slots, it computes what PEFT computes; `verify` agrees."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.verify import verify
from tests.oracles import recipes
from tests.support import trained
from tests.support.exported_types import LORA
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
_LANGUAGE = r".*(language_model|text_model\.layers).*_proj"
TARGETS = dict.fromkeys(("llava", "gemma3_images", "qwen2_5_vl", "smolvlm"), _LANGUAGE)
"""Of the layers of a language model inside another."""


@pytest.mark.parametrize("name", LORA)
def test_lora_merged_and_in_slots_computes_what_peft_computes(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    config = trained._lora(target_modules=TARGETS.get(name, "all-linear"))
    adapter = trained.train(name, base, config, tmp_path / "adapter")
    expected = trained.logits(trained.attached(name, base, (adapter, 1.0)), IDS)
    plain = trained.logits(recipes.load(name, base), IDS)
    assert np.abs(expected - plain).max() > 0.05

    export_onnx(base, swap=[adapter], output=tmp_path / "slots")
    graph = Plain(tmp_path / "slots" / "model.onnx")
    lora, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    lora.Load(str(tmp_path / "slots" / "adapters" / "adapter.onnx_adapter"))
    options.add_active_adapter(lora)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **graph.past}
    assert np.abs(graph.session.run(["logits"], feed)[0] - plain).max() <= TOLERANCE
    assert np.abs(graph.session.run(["logits"], feed, options)[0] - expected).max() <= TOLERANCE

    export_onnx(base, merge=[adapter], output=tmp_path / "merged", target="portable")
    merged = Plain(tmp_path / "merged" / "model.onnx")
    assert np.abs(merged.step(IDS, np.ones_like(IDS)) - expected).max() <= TOLERANCE
    assert verify(tmp_path / "merged", against=base, adapters=[adapter]).difference <= TOLERANCE
