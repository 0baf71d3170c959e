# SPDX-License-Identifier: Apache-2.0
"""Decoders that take embeddings: those of a text from a graph of their own, and any others, as an encoder of images gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4


def _logits(folder, embeds):
    session, contract = open_session(folder / "model.onnx")
    feed = {"inputs_embeds": embeds, "attention_mask": np.ones(embeds.shape[:2], np.int64)}
    empty = np.zeros((len(embeds), contract.kv_heads, 0, contract.head_dim), np.float32)
    feed |= {one.name: empty for one in session.get_inputs() if one.name.startswith("past_key_values.")}
    feed |= {
        f"past_conv.{layer}": np.zeros((len(embeds), *contract.state), np.float32) for layer in contract.convolutions
    }
    return session.run(["logits"], feed)[0]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["llava", "smolvlm", "gemma2", "granite", "lfm2"])
def test_embeddings_of_a_text_and_any_others_give_what_they_give_in_transformers(name, target, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    model = recipes.load(name, base)
    result = export_onnx(base, output=tmp_path / "out", target=target, inputs_embeds=True)
    assert result.contract.embedder == "embed_tokens.onnx"
    session, _ = open_session(tmp_path / "out" / "embed_tokens.onnx")
    embeds = session.run(None, {"input_ids": IDS})[0]
    assert np.abs(embeds - model.get_input_embeddings()(torch.from_numpy(IDS)).detach().numpy()).max() <= 1e-5
    assert np.abs(_logits(tmp_path / "out", embeds) - trained.logits(model, IDS)).max() <= TOLERANCE
    others = np.random.default_rng(3).standard_normal(embeds.shape).astype(np.float32)
    with torch.no_grad():
        expected = model(inputs_embeds=torch.from_numpy(others)).logits.numpy()
    assert np.abs(_logits(tmp_path / "out", others) - expected).max() <= TOLERANCE
    assert surgery.verify(tmp_path / "out", against=base).difference <= TOLERANCE
    assert not (tmp_path / "out" / "genai_config.json").exists()


def test_lora_in_slots_reaches_embeddings_too(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    adapter = trained.train("llama", base, trained.MERGED["lora all-linear"], tmp_path / "adapter")
    export_onnx(base, adapter, output=tmp_path / "out", inputs_embeds=True)
    session, _ = open_session(tmp_path / "out" / "embed_tokens.onnx")
    embeds = session.run(None, {"input_ids": IDS})[0]
    expected = trained.logits(trained.attached("llama", base, (adapter, 1.0)), IDS)
    assert np.abs(_logits(tmp_path / "out", embeds) - expected).max() <= TOLERANCE
    export_onnx(base, swap=adapter, output=tmp_path / "slots", inputs_embeds=True)
    assert surgery.verify(tmp_path / "slots").difference <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("gemma3_images", "both directions", {}),
        ("qwen2_5_vl", "height and width", {}),
        ("bert_sentence", "only decoders", {}),
        ("llava", "layout", {"layout": "optimum"}),
        ("llama", "soft prompt", {"bake_prompt": [3, 4]}),
    ],
)
def test_what_embeddings_would_not_say_is_refused(name, words, options, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    if "bake_prompt" in options:
        options = {"prefix": trained.train(name, base, trained.PROMPTS["prompt"], tmp_path / "adapter")}
    with pytest.raises(FitError, match=words):
        export_onnx(base, output=tmp_path / "out", inputs_embeds=True, **options)


def test_running_such_a_graph_on_tokens_is_refused(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", inputs_embeds=True)
    with pytest.raises(FitError, match=r"embed_tokens\.onnx"):
        surgery.run(tmp_path / "out", [[3, 4, 5]], device="cpu", max_new=2)
