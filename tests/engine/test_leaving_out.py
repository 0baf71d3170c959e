# SPDX-License-Identifier: Apache-2.0
"""Modules that an adapter saves whole though they are the base's: a format without a place for them loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery
from surgery_formats.errors import FitError
from tests.support.adapter_files import draw, write_base, write_peft
from tests.support.decoder import lora_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUTPUTS = {"mlx": "a", "gguf": "a.gguf", "onnx-adapter": "a.onnx_adapter", "torchtune": "b", "bare": "a.safetensors"}
SIZES = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (6, 8),
    "mlp.up_proj": (6, 8),
    "mlp.down_proj": (8, 6),
}
MODULES = {"0.self_attn.q_proj": (8, 8), "1.mlp.down_proj": (8, 6)}


def _base(folder: Path, *, tied: bool = False) -> Path:
    layers = {f"model.layers.{i}.{leaf}.weight": size for i in range(2) for leaf, size in SIZES.items()}
    shapes = {EMBEDDING: (11, 8), **layers, **({} if tied else {HEAD: (11, 8)})}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8, "head_dim": 4}
    return write_base(folder / "base", shapes, {**config, **sizes})


def _adapter(folder: Path, whole: dict[str, np.ndarray]) -> Path:
    saved = {f"base_model.model.{name}": values for name, values in whole.items()}
    modules = [name.removesuffix(".weight").rpartition(".")[2] for name in whole]
    targets = ["q_proj", "down_proj"]
    return write_peft(folder / "peft", saved | lora_of(1, MODULES), target_modules=targets, modules_to_save=modules)


def _stored(base: Path) -> dict[str, np.ndarray]:
    return load_file(base / "model.safetensors")


@pytest.mark.parametrize("to", OUTPUTS)
def test_the_bases_own_vocabulary_is_left_out_and_named(to: str, tmp_path: Path) -> None:
    base = _base(tmp_path)
    adapter = _adapter(tmp_path, {name: _stored(base)[name] for name in (EMBEDDING, HEAD)})
    result = surgery.convert(adapter, to, output=tmp_path / OUTPUTS[to], base=base)
    left = {entry.site: entry.detail for entry in result.entries if entry.outcome == "dropped"}
    assert left == {EMBEDDING: "the base's own values", HEAD: "the base's own values"}
    for name in ("before", "after"):
        surgery.merge(base, adapter if name == "before" else tmp_path / OUTPUTS[to], output=tmp_path / name)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(np.allclose(tensor, after[name], atol=1e-6) for name, tensor in before.items())


@pytest.mark.parametrize("to", OUTPUTS)
def test_one_number_that_was_trained_is_refused(to: str, tmp_path: Path) -> None:
    base = _base(tmp_path)
    trained = _stored(base)[EMBEDDING].copy()
    trained[10, 5] += 1e-3
    adapter = _adapter(tmp_path, {EMBEDDING: trained, HEAD: _stored(base)[HEAD]})
    with pytest.raises(FitError, match=f"cannot hold 1 of {len(MODULES) + 1} parts"):
        surgery.convert(adapter, to, output=tmp_path / OUTPUTS[to], base=base)


def test_a_format_that_holds_it_keeps_it(tmp_path: Path) -> None:
    base = _base(tmp_path)
    adapter = _adapter(tmp_path, {EMBEDDING: _stored(base)[EMBEDDING]})
    result = surgery.convert(adapter, "peft", output=tmp_path / "out", base=base)
    assert "dropped" not in {entry.outcome for entry in result.entries}
    assert f"base_model.model.{EMBEDDING}" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_what_keeps_a_tied_head_as_it_was_is_a_change(tmp_path: Path) -> None:
    """The embedding gets a LoRA, and the head that follows it elsewhere was saved as it is in the base."""
    base = _base(tmp_path, tied=True)
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{stem}A": draw(1, 2, 11), f"{stem}B": draw(2, 8, 2)}
    tensors[f"base_model.model.{HEAD}"] = _stored(base)[EMBEDDING]
    adapter = write_peft(tmp_path / "a", tensors, target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    with pytest.raises(FitError, match=r"lm_head\.weight' \(replacement"):
        surgery.convert(adapter, "mlx", output=tmp_path / "out", base=base)
