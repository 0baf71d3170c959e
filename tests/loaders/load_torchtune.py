# SPDX-License-Identifier: Apache-2.0
"""torchtune: its checkpointer reads base and adapter, its builders make the model that holds both."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

for absent in ("datasets", "datasets.distributed"):  # it imports them at once, and only its data sets need them
    sys.modules[absent] = MagicMock()

import torch
from loading import IDS, Found, run
from torchtune import training
from torchtune.models import llama3, qwen2

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TYPES = {"llama": ("LLAMA3", llama3.llama3, llama3.lora_llama3), "qwen2": ("QWEN2", qwen2.qwen2, qwen2.lora_qwen2)}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    found = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "max_seq_len": config["max_position_embeddings"],
        "intermediate_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": config["rope_theta"],
    }
    return found | ({"tie_word_embeddings": True} if config["tie_word_embeddings"] else {})


def targets(names: set[str]) -> dict[str, Any]:
    """What the builder asks about the modules of an adapter."""
    leaves = {name.rsplit(".", 2)[0].rpartition(".")[2] for name in names}
    return {
        "lora_attn_modules": [name for name in ATTENTION if name in leaves],
        "apply_lora_to_mlp": bool(leaves & {"w1", "w2", "w3"}),
        "apply_lora_to_output": any(name.startswith("output.") for name in names),
        "use_dora": any(name.endswith("magnitude") for name in names),
    }


def opened(base: Path) -> Callable[[Path | None], Found]:
    config = json.loads((base / "config.json").read_text())
    kind, plain, with_lora = TYPES[config["model_type"]]

    def load(adapter: Path | None) -> Found:
        output = Path(tempfile.mkdtemp())
        resumed: dict[str, Any] = {}
        if adapter is not None:  # it reads an adapter where it resumes a training, and asks for that one's state
            torch.save({}, output / "state.pt")
            resumed = {"adapter_checkpoint": str(adapter / "adapter_model.pt"), "recipe_checkpoint": "state.pt"}
            resumed["should_load_recipe_state"] = True
        state = training.FullModelHFCheckpointer(
            str(base), ["model.safetensors"], kind, str(output), **resumed
        ).load_checkpoint()
        if adapter is None:
            model = plain(**sizes(config))
            model.load_state_dict(state[training.MODEL_KEY])
        else:
            fields, factors = json.loads((adapter / "adapter_config.json").read_text()), state[training.ADAPTER_KEY]
            asked = {**targets(set(factors)), "lora_rank": fields["r"], "lora_alpha": fields["lora_alpha"]}
            if config["tie_word_embeddings"]:
                asked.pop("apply_lora_to_output")
            model = with_lora(**sizes(config), **asked)
            missing, unexpected = model.load_state_dict({**state[training.MODEL_KEY], **factors}, strict=False)
            if missing or unexpected:
                raise ValueError(f"missing {missing}, unexpected {unexpected}")
        with torch.no_grad():
            return {"logits": model.eval()(torch.tensor([IDS]))[0]}

    return load


if __name__ == "__main__":
    run(opened, "torchtune")
