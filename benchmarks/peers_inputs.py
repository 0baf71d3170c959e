# SPDX-License-Identifier: Apache-2.0
"""Adapters for `peers.py`: the shipped one with one fault each, and good ones that PEFT itself makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MODULE = "model.layers.3.mlp.up_proj"
_KEY = f"base_model.model.{MODULE}.lora_%s.weight"
_TOKENIZER = sorted((Path(__file__).parents[1] / "examples" / "base").glob("tokenizer*"))
_FILE = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], Tensors]


@dataclass(frozen=True)
class Faulty:
    """One fault: what a person would call it, and how the shipped adapter gets it."""

    title: str
    change: Change


def _half(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {key: value for key, value in tensors.items() if key != _KEY % "B"}


def _no_b(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {key: value for key, value in tensors.items() if "lora_B" not in key}


def _another_layer(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {key.replace("layers.5.", "layers.9."): value for key, value in tensors.items()}


def _another_prefix(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {
        key.replace("base_model.model.model.", "base_model.model.decoder."): value for key, value in tensors.items()
    }


def _nan(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    tensors[_KEY % "A"][0, 0] = float("nan")
    return tensors


def _alpha(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    config["lora_alpha"] = float("nan")
    return tensors


def _fewer_targets(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    config["target_modules"] = ["q_proj", "v_proj"]
    return tensors


def _fewer_layers(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    config["layers_to_transform"] = [0]
    return tensors


def _shape(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return tensors | {_KEY % "A": torch.ones(8, 99)}


def _scale(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    config["use_rslora"] = True
    return tensors


FAULTS: Mapping[str, Faulty] = {
    "half": Faulty("half of one LoRA is missing", _half),
    "no-b": Faulty("every `lora_B` is missing", _no_b),
    "layer": Faulty("one layer is not in the base", _another_layer),
    "keys": Faulty("no key matches", _another_prefix),
    "targets": Faulty("`target_modules` names fewer modules than the file has", _fewer_targets),
    "layers": Faulty("`layers_to_transform` names one layer, the file has six", _fewer_layers),
    "nan": Faulty("NaN in a factor", _nan),
    "alpha": Faulty("`lora_alpha` is NaN", _alpha),
    "shape": Faulty("a factor of another shape", _shape),
    "scale": Faulty("`use_rslora` was flipped: 2.8 times the scale", _scale),
}


def faulty(name: str, source: Path, folder: Path) -> Path:
    """The adapter of `source` with the fault `name`, in `folder`."""
    folder.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = FAULTS[name].change(load_file(source / _FILE), config)
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


GOOD: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoRA", {}),
    "rslora": ("rsLoRA", {"use_rslora": True}),
    "pattern": ("`rank_pattern`, `alpha_pattern`", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    "dora": ("DoRA", {"use_dora": True}),
    "saved": ("LoRA and a saved head", {"modules_to_save": ["lm_head"]}),
    "embedding": ("LoRA of the embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
}


def good(name: str, base: Path, folder: Path) -> Path:
    """An adapter as PEFT writes it, every trained number random, so that none is without effect."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    asked = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]} | GOOD[name][1]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**asked))
    with torch.no_grad():
        for trained in (one for one in model.parameters() if one.requires_grad):
            trained.add_(torch.randn_like(trained) * 0.02)
    model.save_pretrained(folder)
    return folder


def merged_in_float64(base: Path, adapter: Path) -> Tensors:
    """PEFT's own merge with base, factors and arithmetic in float64: what every other merge is measured against."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    attached = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(torch.float64)
    return dict(attached.merge_and_unload().state_dict())


def other_base(base: Path, folder: Path) -> Path:
    """A base of the same shapes and other values."""
    shutil.copytree(base, folder)
    torch.manual_seed(11)
    tensors = {
        key: torch.randn_like(value) * value.std() for key, value in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fine_tune(folder: Path) -> tuple[Path, Path]:
    """A small Qwen2, which has biases, and its full fine-tune: every matrix changed by rank 2, every vector by random numbers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, num_hidden_layers=2, tie_word_embeddings=False, **size))
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn_like(one) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    with torch.no_grad():
        for one in model.parameters():
            change = torch.randn(len(one), 2) @ torch.randn(2, one.shape[1]) if one.ndim == 2 else torch.randn(len(one))
            one.add_((change * 0.02).to(one.dtype))
    model.save_pretrained(folder / "tuned")
    for made in ("base", "tuned"):  # without a tokenizer there mergekit asks the hub for one
        for file in _TOKENIZER:
            shutil.copy(file, folder / made)
    return folder / "base", folder / "tuned"
