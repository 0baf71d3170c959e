# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n beyond what all decoders are compared in: its folder with images and sound, its tables, and what it refuses."""

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
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 95]])
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("gemma3n", tmp_path_factory.mktemp("base"))


def _with_other_senses(base, folder):
    """The same language model in a folder as transformers saves the whole model, which it builds with timm alone."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    outer = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": config}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = load_file(base / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    others = ("model.vision_tower.stem.weight", "model.embed_vision.embedding.weight", "model.audio_tower.x.weight")
    save_file({**tensors, **{name: torch.randn(4, 4) for name in others}}, folder / "model.safetensors")
    return folder


def test_the_language_model_of_a_folder_with_images_and_sound_is_the_same(base, tmp_path):
    whole = _with_other_senses(base, tmp_path / "whole")
    export_onnx(whole, output=tmp_path / "out")
    found = Plain(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - trained.logits(recipes.load("gemma3n", base), IDS)).max() <= TOLERANCE
    assert surgery.verify(tmp_path / "out", against=whole).difference <= TOLERANCE


def test_run_writes_the_tokens_of_transformers(base, tmp_path):
    export_onnx(base, output=tmp_path / "out")
    model = recipes.load("gemma3n", base)
    prompts = [IDS[0].tolist(), [29, 8, 77]]
    ran = surgery.run(tmp_path / "out", prompts, device="cpu", max_new=8)
    for prompt, row in zip(prompts, ran.texts, strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert list(row.tokens) == tokens


def test_lora_of_the_table_of_every_layer(base, tmp_path):
    config = trained._lora(target_modules=["embed_tokens_per_layer", "q_proj"])
    adapter = trained.train("gemma3n", base, config, tmp_path / "adapter")
    expected = trained.logits(trained.attached("gemma3n", base, (adapter, 1.0)), IDS)
    export_onnx(base, merge=[adapter], output=tmp_path / "merged")
    merged = Plain(tmp_path / "merged" / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(merged - expected).max() <= TOLERANCE
    export_onnx(base, swap=[adapter], output=tmp_path / "slots")
    assert surgery.verify(tmp_path / "slots", against=base).difference <= TOLERANCE


def test_embeddings_instead_of_tokens_are_refused(base, tmp_path):
    with pytest.raises(FitError, match="embedding of the token itself"):
        export_onnx(base, output=tmp_path / "out", inputs_embeds=True)
    prompt = trained.train("gemma3n", base, trained.PROMPTS["prompt"], tmp_path / "prompt")
    with pytest.raises(FitError, match="virtual tokens"):
        export_onnx(base, prefix=prompt, output=tmp_path / "out")
