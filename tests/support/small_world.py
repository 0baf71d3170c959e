# SPDX-License-Identifier: Apache-2.0
"""Sound inputs of every kind, as small as they come, for tests that damage them: models, adapters, prompts, graphs, outputs, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from surgery_cli.group import surgery

__all__ = ["invoke", "make_world"]

HIDDEN, INNER, LAYERS, VOCABULARY, RANK = 16, 24, 2, 64, 2
PREFIX = "base_model.model.model.layers"

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def invoke(*words: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(surgery, [str(word) for word in words])


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _model(folder: Path, tuned: bool = False) -> None:
    folder.mkdir()
    draw, further = np.random.default_rng(0), np.random.default_rng(1)
    tensors = {}
    for name, shape in _shapes().items():
        values = draw.normal(size=shape) * 0.2 + (len(shape) == 1)
        if tuned and len(shape) == 2 and "layers" in name:
            values = values + further.normal(size=(shape[0], RANK)) @ further.normal(size=(RANK, shape[1])) * 0.05
        tensors[name] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w2")
    Tokenizer(words).save(str(folder / "tokenizer.json"))


def _adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"base_model_name_or_path": "base", "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def _lora(folder: Path, seed: int) -> None:
    draw, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for module, rows in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            at = f"{PREFIX}.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = draw.normal(size=(RANK, HIDDEN)).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = draw.normal(size=(rows, RANK)).astype(np.float32)
    more: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "bias": "none", "fan_in_fan_out": False}
    _adapter(folder, tensors, peft_type="LORA", r=RANK, lora_alpha=4, **more)


def _prompt(folder: Path, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(3, HIDDEN)).astype(np.float32)
    shape = {"num_virtual_tokens": 3, "token_dim": HIDDEN, "num_transformer_submodules": 1}
    more = {"num_layers": LAYERS, "num_attention_heads": 2, "prompt_tuning_init": "RANDOM"}
    _adapter(folder, {"prompt_embeddings": rows}, peft_type="PROMPT_TUNING", **shape, **more)


def make_world(root: Path) -> dict[str, Path]:
    """Everything under `root`, by the names that command lines use."""
    root.mkdir(exist_ok=True)
    _model(root / "base")
    _model(root / "tuned", tuned=True)
    _lora(root / "lora", 1)
    _lora(root / "lora2", 2)
    _prompt(root / "prompt", 3)
    _prompt(root / "prompt2", 4)
    at = {path.name: path for path in root.iterdir()}
    made = (
        ("graph", "export-onnx {base} -o {graph}"),
        ("slots", "export-onnx {base} --swap {lora} -o {slots}"),
        ("merged", "merge {base} {lora} -o {merged} --reversible"),
        ("delta", "extract-lora {base} {tuned} --matrices full -o {delta}"),
    )
    for name, words in made:
        at[name] = root / name
        result = invoke(*words.format(**at).split())
        assert result.exit_code == 0, result.stderr
    at["onnx_adapter"] = at["slots"] / "adapters" / "lora.onnx_adapter"
    at["recipe"] = root / "recipe.yaml"
    step = "{verb: merge, base: base, adapters: [adapter]}"
    inputs = f"inputs: {{base: {at['base']}, adapter: {at['lora']}}}"
    at["recipe"].write_text(f"{inputs}\nsteps:\n  - {step}\n")
    return at
