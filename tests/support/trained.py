# SPDX-License-Identifier: Apache-2.0
"""Random adapters of every kind by PEFT, for the tiny models of the exporter's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests.oracles import peft_oracle, recipes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 5


def _lora(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ALL, **fields}


# The eighteen of which onnxruntime-genai's builder drops or refuses more than half, and a few more.
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora all-linear": _lora(),
    "lora q v": _lora(target_modules=["q_proj", "v_proj"]),
    "rslora": _lora(use_rslora=True),
    "modules_to_save head": _lora(modules_to_save=["lm_head"]),
    "modules_to_save norm": _lora(modules_to_save=["norm"]),
    "trainable tokens": _lora(trainable_token_indices=[3, 17, 42]),
    "dora": _lora(use_dora=True),
    "lora_bias": _lora(lora_bias=True),
    "lora embedding": _lora(target_modules=["q_proj", "embed_tokens"]),
    "oft": ("OFTConfig", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
    "loha": ("LoHaConfig", {"r": 3, "target_modules": ["q_proj", "up_proj"]}),
    "lora head": _lora(target_modules=["q_proj", "lm_head"]),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 5, "target_modules": ["q_proj", "o_proj"]}),
    "lokr": ("LoKrConfig", {"r": 3, "target_modules": ["q_proj", "up_proj"]}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": TOKENS}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": TOKENS, "encoder_hidden_size": 16}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": TOKENS}),
    "prefix projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": TOKENS, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
}


def train(
    name: str, base: Path, config: tuple[str, dict[str, Any]], folder: Path, seed: int = 2, task: str = "CAUSAL_LM"
) -> Path:
    """Write a random adapter, as PEFT saves it after training."""
    kind, fields = config
    with peft_oracle.quiet():
        wrapped = peft.get_peft_model(recipes.load(name, base), getattr(peft, kind)(task_type=task, **fields))
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(seed))
        wrapped.save_pretrained(folder)
    return folder


def attached(name: str, base: Path, *adapters: tuple[Path, float]) -> Any:
    """The model with adapters attached, unmerged."""
    with peft_oracle.quiet():
        model = recipes.load(name, base)
        names = [f"a{i}" for i in range(len(adapters))]
        wrapped = peft.PeftModel.from_pretrained(model, adapters[0][0], adapter_name=names[0])
        for one, (path, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.load_adapter(path, adapter_name=one)
        if len(names) > 1:
            wrapped.base_model.set_adapter(names)
        for module in wrapped.modules():
            if isinstance(module, peft_oracle.LoraLayer | peft_oracle.LycorisLayer):
                for one, (_, weight) in zip(names, adapters, strict=True):
                    if one in module.scaling:
                        module.scaling[one] *= weight
        return wrapped.eval()


def logits(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the real tokens only: PEFT gives those of virtual ones too."""
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return np.asarray(found[:, -ids.shape[1] :].numpy())


def generated(model: Any, ids: np.ndarray[Any, Any], steps: int) -> list[int]:
    """Greedy tokens by ``generate``."""
    tokens = torch.from_numpy(ids)
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), peft_oracle.quiet():
        found = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    return [int(one) for one in found[0, -steps:]]
