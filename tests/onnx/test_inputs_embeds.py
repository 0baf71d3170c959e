# SPDX-License-Identifier: Apache-2.0
"""Decoders that take embeddings: those of a text from a graph of their own, and any others, as an encoder of images gives them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4


def _logits(folder, embeds, **more):
    session, contract = open_session(folder / "model.onnx")
    feed = {"inputs_embeds": embeds, "attention_mask": np.ones(embeds.shape[:2], np.int64), **more}
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


@pytest.mark.parametrize("options", [{"weights_type": "int4"}, {"linear": "matmul"}], ids=str)
def test_weights_inside_both_graphs_are_verified_together(options, tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", inputs_embeds=True, weights="embed", **options)
    for against in (base, None):
        assert surgery.verify(tmp_path / "out", against=against).difference <= TOLERANCE


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
        ("qwen3_vl", "first layers", {}),
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


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_on_a_grid_turn_keys_by_time_height_and_width(name, target, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    model = recipes.load(name, base)
    export_onnx(base, output=tmp_path / "out", target=target, inputs_embeds=True)
    draw = np.random.default_rng(4)
    embeds = draw.standard_normal((1, 9, 32)).astype(np.float32)
    places = np.stack(
        [np.array([[0, 1, 2, 2, 2, 2, 4, 5, 6]]), draw.integers(0, 9, (1, 9)), draw.integers(0, 9, (1, 9))]
    )
    with torch.no_grad():
        states = model.model.language_model(inputs_embeds=torch.tensor(embeds), position_ids=torch.tensor(places))
        expected = model.lm_head(states.last_hidden_state).numpy()
        flat = model.model.language_model(inputs_embeds=torch.tensor(embeds)).last_hidden_state
    assert np.abs(model.lm_head(flat).detach().numpy() - expected).max() > 0.01
    assert np.abs(_logits(tmp_path / "out", embeds, position_ids=places) - expected).max() <= TOLERANCE
    compared = surgery.verify(tmp_path / "out", against=base)
    assert compared.difference <= TOLERANCE
    assert any("on a grid" in check.name for check in compared.checks)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_tokens_of_one_image_see_each_other(target, tmp_path):
    base = recipes.build("gemma3_images", tmp_path / "base")
    model = recipes.load("gemma3_images", base)
    export_onnx(base, output=tmp_path / "out", target=target, inputs_embeds=True)
    embeds = np.random.default_rng(4).standard_normal((2, 16, 32)).astype(np.float32)
    types = np.array(
        [[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
    )
    with torch.no_grad():
        given = torch.from_numpy(embeds)
        expected = model(inputs_embeds=given, token_type_ids=torch.from_numpy(types)).logits.numpy()
        causal = model(inputs_embeds=given).logits.numpy()
    assert np.abs(causal - expected).max() > 0.01
    assert np.abs(_logits(tmp_path / "out", embeds, token_type_ids=types) - expected).max() <= TOLERANCE
    assert np.abs(_logits(tmp_path / "out", embeds, token_type_ids=0 * types) - causal).max() <= TOLERANCE
    compared = surgery.verify(tmp_path / "out", against=base)
    assert compared.difference <= TOLERANCE
    assert any("with images" in check.name for check in compared.checks)


def test_the_language_model_alone_has_the_logits_of_the_whole(tmp_path):
    base, bare = recipes.build("qwen2_vl", tmp_path / "base"), tmp_path / "bare"
    bare.mkdir()
    config = json.loads((base / "config.json").read_text())["text_config"]
    (bare / "config.json").write_text(json.dumps({**config, "architectures": None}))
    tensors = load_file(base / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "visual" not in name}
    save_file({name.replace("language_model.", ""): value for name, value in kept.items()}, bare / "model.safetensors")
    export_onnx(bare, output=tmp_path / "out", inputs_embeds=True)
    embeds = open_session(tmp_path / "out" / "embed_tokens.onnx")[0].run(None, {"input_ids": IDS})[0]
    places = np.tile(np.arange(IDS.size), (3, 1, 1))
    expected = trained.logits(recipes.load("qwen2_vl", base), IDS)
    assert np.abs(_logits(tmp_path / "out", embeds, position_ids=places) - expected).max() <= TOLERANCE
