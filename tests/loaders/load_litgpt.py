# SPDX-License-Identifier: Apache-2.0
"""litgpt: its conversion of the base, the adapter's own ``hyperparameters.yaml``, and its GPT with LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from litgpt.lora import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.merge_lora import load_lora_metadata
from loading import IDS, Found, run
from safetensors.torch import load_file


def config_of(base: Path, **lora: object) -> Config:
    fields = json.loads((base / "config.json").read_text())
    return Config(
        name="tiny",
        block_size=fields["max_position_embeddings"],
        vocab_size=fields["vocab_size"],
        padded_vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=fields["num_attention_heads"],
        n_query_groups=fields["num_key_value_heads"],
        n_embd=fields["hidden_size"],
        head_size=fields["head_dim"],
        intermediate_size=fields["intermediate_size"],
        norm_eps=fields["rms_norm_eps"],
        rope_base=int(fields["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **lora,
    )


def opened(base: Path) -> Callable[[Path | None], Found]:
    state: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config_of(base), {}, state, load_file(base / "model.safetensors"))

    def load(adapter: Path | None) -> Found:
        if adapter is None:
            model, held = GPT(config_of(base)), dict(state)
        else:
            model = GPT(config_of(base, **load_lora_metadata(adapter)[0]))
            factors = torch.load(adapter / "lit_model.pth.lora", weights_only=True)
            held = state | factors.get("model", factors)
        model.load_state_dict(held)  # LoRA's layers rename what a checkpoint calls the weights inside them
        with torch.no_grad():
            return {"logits": model.eval()(torch.tensor([IDS]))[0]}

    return load


if __name__ == "__main__":
    run(opened, "litgpt")
