# SPDX-License-Identifier: Apache-2.0
"""Models and adapters of real sizes that are all header: the files are sparse, no weight is ever written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType

SIZES = {  # of Llama 3.2 1B, Llama 3.1 8B and 70B, as their config.json say
    "1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "head_dim": 128,
    },
    "70b": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "head_dim": 128,
    },
}
KV_HEADS, VOCABULARY = 8, 128256


def write(path: Path, entries: Iterable[tuple[str, tuple[int, ...]]], dtype: DType = DType.BF16) -> None:
    """A safetensors file of the right size without data."""
    header, ranges = layout([(name, dtype, shape) for name, shape in entries], {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(max(offset + nbytes for offset, nbytes in ranges.values()))


def linears(size: str) -> dict[str, tuple[int, int]]:
    """``{module below a layer: (out, in)}``."""
    config = SIZES[size]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], KV_HEADS * config["head_dim"]
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def llama(folder: Path, size: str, *, tied: bool) -> Path:
    """A Llama in one file."""
    folder.mkdir(parents=True)
    config = SIZES[size]
    hidden = config["hidden_size"]
    entries = [("model.embed_tokens.weight", (VOCABULARY, hidden)), ("model.norm.weight", (hidden,))]
    entries += [] if tied else [("lm_head.weight", (VOCABULARY, hidden))]
    for layer in range(config["num_hidden_layers"]):
        entries += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in linears(size).items()]
        entries += [
            (f"model.layers.{layer}.{name}.weight", (hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    write(folder / "model.safetensors", entries)
    extra = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    extra |= {"num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | extra))
    return folder


def lora(folder: Path, size: str, rank: int, dtype: DType = DType.F32) -> Path:
    """A PEFT LoRA on every linear layer of that Llama."""
    folder.mkdir(parents=True)
    entries = []
    for layer in range(SIZES[size]["num_hidden_layers"]):
        for name, (out, inp) in linears(size).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            entries += [(f"{module}.lora_A.weight", (rank, inp)), (f"{module}.lora_B.weight", (out, rank))]
    write(folder / "adapter_model.safetensors", entries, dtype)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
