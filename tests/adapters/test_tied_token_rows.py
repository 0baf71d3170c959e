# SPDX-License-Identifier: Apache-2.0
"""Rows of new tokens beside a tied head, in all the ways that PEFT writes them (peft#2898)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats import read_adapter
from surgery_formats.errors import MalformedError

NEW = [60, 61]
SPELLINGS: dict[str, dict[str, Any]] = {
    "dict": {"trainable_token_indices": {"embed_tokens": NEW}},
    "list": {"trainable_token_indices": NEW},
    "both": {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "tying": {"trainable_token_indices": {"embed_tokens": NEW}, "ensure_weight_tying": True},
}


def trained(folder: Path, spelling: str, *, tied: bool) -> np.ndarray[Any, Any]:
    """Write base and adapter; returns PEFT's logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=60, tie_word_embeddings=tied, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(62, mean_resizing=False)
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **SPELLINGS[spelling])
    )
    for name, parameter in peft.named_parameters():
        if "lora" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    peft.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return peft.eval()(torch.tensor([[5, 60, 17, 61]])).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_graph_is_what_peft_computes(tmp_path: Path, spelling: str, tied: bool) -> None:
    wanted = trained(tmp_path, spelling, tied=tied)
    surgery.export_onnx(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    past = {
        port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past")
    }
    ids = np.array([[5, 60, 17, 61]])
    found = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0]
    assert np.abs(found - wanted).max() < 1e-5


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, "dict", tied=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MalformedError, match=r"differ from those of 'model\.embed_tokens\.weight'"):
        read_adapter(tmp_path / "adapter")


def test_copies_are_compared_where_the_named_layer_has_no_rows(tmp_path: Path) -> None:
    trained(tmp_path, "dict", tied=True)
    file, leaf = tmp_path / "adapter" / "adapter_model.safetensors", "token_adapter.trainable_tokens_delta"
    tensors = load_file(file)
    copy = tensors.pop(f"base_model.model.model.embed_tokens.{leaf}")
    save_file(tensors | {f"base_model.model.model.wte.{leaf}": copy}, file, metadata={"format": "pt"})
    assert read_adapter(tmp_path / "adapter").updates
    save_file(tensors | {f"base_model.model.model.wte.{leaf}": copy + 1}, file, metadata={"format": "pt"})
    with pytest.raises(MalformedError, match=r"its rows differ from those of '.*', and the configuration names"):
        read_adapter(tmp_path / "adapter")
