# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with litgpt's own classes: LoRAs of a small model, and what its merge makes of them.

    python make.py [--check]

Needs litgpt 0.5.13 and torch. ``expected.safetensors`` has the weights
that ``merge_lora_weights`` changed, its ``attn.qkv`` taken apart, under transformers' names.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from safetensors.numpy import save_file

HERE = Path(__file__).parent
LAYERS, HIDDEN, INNER, HEADS, GROUPS, VOCABULARY = 2, 32, 48, 4, 2, 24
MODEL: dict[str, Any] = {
    "name": "tiny",
    "block_size": 64,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_query_groups": GROUPS,
    "n_embd": HIDDEN,
    "head_size": HIDDEN // HEADS,
    "intermediate_size": INNER,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
_NONE = {f"lora_{name}": False for name in ("query", "key", "value", "projection", "mlp", "head")}
CASES: dict[str, dict[str, Any]] = {
    "default": {**_NONE, "lora_r": 3, "lora_alpha": 12, "lora_query": True, "lora_value": True},
    "all": {**dict.fromkeys(_NONE, True), "lora_r": 2, "lora_alpha": 5},
}
_NAMES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def values(name: str, *sizes: int) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return (draw.standard_normal(sizes) / 4).astype(np.float32)


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    size = HIDDEN // HEADS
    for name, tensor in state.items():
        weight = tensor.detach().numpy()
        stem = name.replace("linear.", "")
        if stem == "lm_head.weight":
            found[stem] = weight
        elif stem == "transformer.wte.weight":
            found["model.embed_tokens.weight"] = weight
        elif stem == "transformer.ln_f.weight":
            found["model.norm.weight"] = weight
        else:
            _, _, layer, rest = stem.removesuffix(".weight").split(".", 3)
            at = f"model.layers.{layer}"
            if rest == "attn.qkv":
                parts = np.split(weight, [HEADS * size, (HEADS + GROUPS) * size])
                found |= {f"{at}.self_attn.{p}_proj.weight": part for p, part in zip("qkv", parts, strict=True)}
            elif rest in _NAMES:
                found[f"{at}.{_NAMES[rest]}.weight"] = weight
            else:
                norm = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}[rest]
                found[f"{at}.{norm}.weight"] = weight
    return {name: np.ascontiguousarray(weight, np.float32) for name, weight in found.items()}


def make(root: Path) -> None:
    base = root / "base"
    base.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (base / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    for case, settings in CASES.items():
        folder = root / case
        folder.mkdir()
        model = GPT(Config(**MODEL, **settings))
        state = {name: torch.from_numpy(values(name, *t.shape)) for name, t in model.state_dict().items()}
        model.load_state_dict(state)
        before = as_transformers({name: t.clone() for name, t in state.items() if not lora_filter(name, t)})
        if case == "default":
            save_file(before, base / "model.safetensors", {"format": "pt"})
        torch.save({"model": {n: t for n, t in state.items() if lora_filter(n, t)}}, folder / "lit_model.pth.lora")
        hyper = {"checkpoint_dir": "checkpoints/tiny", "precision": None, **settings, "train": {"epochs": 1}}
        (folder / "hyperparameters.yaml").write_text(yaml.dump(hyper))
        (folder / "model_config.yaml").write_text(yaml.dump(MODEL))
        merge_lora_weights(model)
        after = as_transformers({n: t for n, t in model.state_dict().items() if not lora_filter(n, t)})
        changed = {name: value for name, value in after.items() if not np.array_equal(value, before[name])}
        save_file(changed, folder / "expected.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep, same_values

    keep(HERE, make, check=options.check, same=same_values)


if __name__ == "__main__":
    main()
