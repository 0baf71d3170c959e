# SPDX-License-Identifier: Apache-2.0
"""Inputs of `crash_table`, small enough that a command takes a few hundredths of a second: a Llama of two layers and its adapters.

Everything else - graphs, other formats, merged models - is made of these by the command itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file

__all__ = ["write_inputs"]

HIDDEN, LAYERS, MLP, VOCABULARY, RANK = 32, 2, 64, 64, 2
_WORDS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 33 + VOCABULARY - 3))]
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": shape for name, shape in _LINEAR.items()}
        shapes |= {f"{at}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _model(folder: Path, change: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    drawn = {
        name: (1 + 0.1 * draw.standard_normal(shape) if len(shape) == 1 else 0.2 * draw.standard_normal(shape))
        for name, shape in _shapes().items()
    }
    save_file(
        {name: change(name, value.astype(np.float32)) for name, value in drawn.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(_WORDS)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"})
    )


def _adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: object) -> None:
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": v.astype(np.float32) for k, v in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "in/base", "task_type": "CAUSAL_LM", **config})
    )


def _lora(folder: Path, seed: int, *modules: str, **config: object) -> None:
    draw, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for module in modules:
            rows, columns = _LINEAR[module]
            at = f"model.layers.{layer}.{module}"
            tensors[f"{at}.lora_A.weight"] = 0.1 * draw.standard_normal((RANK, columns))
            tensors[f"{at}.lora_B.weight"] = 0.1 * draw.standard_normal((rows, RANK))
    targets = [module.split(".")[1] for module in modules]
    _adapter(folder, tensors, peft_type="LORA", r=RANK, lora_alpha=RANK, target_modules=targets, bias="none", **config)


def _traced(folder: Path) -> None:
    """A graph as torch's exporter leaves it: a node says which line of source it is of."""
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "model.py", line 1, in forward')
    graph = onnx.helper.make_graph([node], "traced", ends[:1], ends[1:], [weight])
    folder.mkdir()
    onnx.save(onnx.helper.make_model(graph), folder / "model.onnx")


def write_inputs(folder: Path) -> None:
    """Write them into the new folder."""
    folder.mkdir()
    draw = np.random.default_rng(9)
    _model(folder / "base")

    def tuned(name: str, value: np.ndarray) -> np.ndarray:
        if value.ndim == 1:
            return value
        change = draw.standard_normal((value.shape[0], 2)) @ draw.standard_normal((2, value.shape[1]))
        return value + (0.02 * change).astype(np.float32)

    _model(folder / "tuned", tuned)
    _traced(folder / "traced")
    _lora(folder / "lora", 1, "self_attn.q_proj", "self_attn.v_proj")
    _lora(folder / "other", 2, "self_attn.q_proj", "mlp.up_proj")
    prompt = folder / "prompt"
    prompt.mkdir()
    rows = 0.2 * draw.standard_normal((3, HIDDEN))
    save_file({"prompt_embeddings": rows.astype(np.float32)}, prompt / "adapter_model.safetensors")
    (prompt / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "PROMPT_TUNING",
                "task_type": "CAUSAL_LM",
                "num_virtual_tokens": 3,
                "token_dim": HIDDEN,
                "num_transformer_submodules": 1,
                "num_layers": LAYERS,
                "num_attention_heads": 4,
                "base_model_name_or_path": "in/base",
            }
        )
    )
