# SPDX-License-Identifier: Apache-2.0
"""Adapters that were trained for a task: merged, in slots and replaced, their graphs give what PEFT gives attached."""

from __future__ import annotations

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers

import surgery
from surgery_formats.errors import FitError
from tests.oracles import peft_oracle, recipes

LIMIT = 1e-4
IDS = np.array([[5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50, 4, 4, 4]])  # 4 is the padding token
MASK = (IDS != 4).astype(np.int64)


def trained(base, folder, cls, task, targets=("q_proj", "v_proj"), **fields):
    """A random LoRA with its head, and the outputs of PEFT's attached model, by name."""
    with peft_oracle.quiet():
        model = getattr(transformers, cls).from_pretrained(base, ignore_mismatched_sizes=True, **fields)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, target_modules=[*targets]))
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(3))
        wrapped.save_pretrained(folder)
    with torch.no_grad():
        found = wrapped.eval()(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK))
    return {name: found[name].numpy() for name in ("logits", "start_logits", "end_logits") if name in found}


CASES = {
    "classifier": ("llama_classifier", "LlamaForSequenceClassification", "SEQ_CLS", {}),
    "classifier of a language model": (
        "llama",
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        {"num_labels": 2, "pad_token_id": 4},
    ),
    "tokens": ("qwen3", "Qwen3ForTokenClassification", "TOKEN_CLS", {"num_labels": 5}),
    "spans": ("qwen3_spans", "Qwen3ForQuestionAnswering", "QUESTION_ANS", {}),
    "spans of masks": ("bert_masks", "BertForQuestionAnswering", "QUESTION_ANS", {"num_labels": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    name, cls, task, fields = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    base = recipes.build(name, folder / "base", **{key: fields[key] for key in fields if key == "pad_token_id"})
    targets = ("query", "value") if "Bert" in cls else ("q_proj", "v_proj")
    return base, folder / "adapter", trained(base, folder / "adapter", cls, task, targets, **fields)


def outputs(graph, adapter=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    run, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)
    feed = {"input_ids": IDS, "attention_mask": MASK}
    if "token_type_ids" in {port.name for port in session.get_inputs()}:
        feed["token_type_ids"] = np.zeros_like(IDS)
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feed, run), strict=True))


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        where = MASK.astype(bool) if value.shape[:2] == IDS.shape else slice(None)
        assert np.abs(found[name] - value)[where].max() <= LIMIT


def test_merged_they_are_pefts(case, tmp_path):
    base, adapter, wanted = case
    result = surgery.export_onnx(base, adapter, output=tmp_path / "out")
    assert_equal(outputs(tmp_path / "out" / "model.onnx"), wanted)
    surgery.verify(tmp_path / "out", against=base, adapters=adapter)
    assert result.contract.task != "text-generation"


def test_swapped_they_are_pefts(case, tmp_path):
    base, adapter, wanted = case
    surgery.export_onnx(base, swap=adapter, output=tmp_path / "out")
    found = outputs(tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "adapter.onnx_adapter")
    assert_equal(found, wanted)
    surgery.verify(tmp_path / "out")


def test_a_merged_checkpoint_is_exported_for_the_task(case, tmp_path):
    base, adapter, wanted = case
    surgery.merge(base, adapter, output=tmp_path / "merged")
    surgery.export_onnx(tmp_path / "merged", output=tmp_path / "merged")
    assert_equal(outputs(tmp_path / "merged" / "model.onnx"), wanted)


def test_another_task_is_asked_for(tmp_path):
    base = recipes.build("llama_classifier", tmp_path / "base")
    result = surgery.export_onnx(base, output=tmp_path / "out", task="feature-extraction")
    assert result.contract.task == "feature-extraction"
    found = outputs(tmp_path / "out" / "model.onnx")
    with torch.no_grad():
        model = recipes.load("llama_classifier", base).model
        wanted = model(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).last_hidden_state.numpy()
    assert_equal(found, {"last_hidden_state": wanted})
    surgery.verify(tmp_path / "out", against=base)
    with pytest.raises(FitError, match="lm_head"):
        surgery.export_onnx(base, output=tmp_path / "no", task="text-generation")
    with pytest.raises(FitError, match="no task 'poetry'"):
        surgery.export_onnx(base, output=tmp_path / "no", task="poetry")
    with pytest.raises(FitError, match="multiple-choice"):
        surgery.export_onnx(base, output=tmp_path / "no", task="multiple-choice")


@pytest.mark.parametrize("name", ["gpt2_classifier", "gemma2_classifier"])
def test_a_soft_prompt_in_front_of_a_text_that_is_classified(tmp_path, name):
    """PEFT takes the last place of a padded row for its last token, so it is asked for each row alone."""
    base = recipes.build(name, tmp_path / "base")
    with peft_oracle.quiet():
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
        wrapped = peft.get_peft_model(recipes.load(name, base), config)
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(3))
        wrapped.save_pretrained(tmp_path / "prompt")
    surgery.export_onnx(base, tmp_path / "prompt", output=tmp_path / "out")
    found = outputs(tmp_path / "out" / "model.onnx")["logits"]
    for row, mask, logits in zip(IDS, MASK, found, strict=True):
        own = torch.from_numpy(row[mask.astype(bool)])[None]
        with torch.no_grad():
            wanted = wrapped.eval()(own, attention_mask=torch.ones_like(own)).logits.numpy()[0]
        assert np.abs(logits - wanted).max() <= LIMIT
    surgery.verify(tmp_path / "out", against=base, adapters=tmp_path / "prompt")
