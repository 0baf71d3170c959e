# SPDX-License-Identifier: Apache-2.0
"""Makes what lies beside it with llama.cpp's own converters: GGUF LoRAs of PEFT adapters, and the bases of some.

    python make.py LLAMA_CPP [--check]

LLAMA_CPP is the source of llama.cpp (in the sdist of llama-cpp-python: ``vendor/llama.cpp``). Needs torch, transformers,
gguf and safetensors. ``--check`` compares with the files that are there instead of writing them.

``expected.safetensors`` has the weights that an adapter changes, ``W + alpha / r B A`` in float64 rounded to float32, in
the layout of the base on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
RANK, ALPHA = 3, 7.0

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 24,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "phi3": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 16,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def values(name: str, *sizes: int) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return (draw.standard_normal(sizes) / 4).astype(np.float32)


def modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Linear layers and the embedding by name, with their sizes."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    found: dict[str, tuple[int, int]] = {"model.embed_tokens": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        found["lm_head"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        if config["model_type"] == "phi3":
            found[f"{at}.self_attn.qkv_proj"] = q + 2 * kv, hidden
            found[f"{at}.mlp.gate_up_proj"] = 2 * inner, hidden
            found[f"{at}.mlp.down_proj"] = hidden, inner
        else:
            for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                found[f"{at}.self_attn.{name}"] = rows, hidden
        found[f"{at}.self_attn.o_proj"] = hidden, q
        if config["model_type"] == "mixtral":
            found[f"{at}.block_sparse_moe.gate"] = config["num_local_experts"], hidden
            for expert in range(config["num_local_experts"]):
                for name, sizes in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                    found[f"{at}.block_sparse_moe.experts.{expert}.{name}"] = sizes
        elif "num_experts" in config:
            found[f"{at}.mlp.gate"] = config["num_experts"], hidden
            inner = config["moe_intermediate_size"]
            for expert in range(config["num_experts"]):
                for name in ("gate_proj", "up_proj"):
                    found[f"{at}.mlp.experts.{expert}.{name}"] = inner, hidden
                found[f"{at}.mlp.experts.{expert}.down_proj"] = hidden, inner
        elif config["model_type"] != "phi3":
            for name, sizes in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                found[f"{at}.mlp.{name}_proj"] = sizes
    return found


def write_base(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": values(name, *sizes) for name, sizes in modules(config).items()}
    width = config.get("head_dim", 8)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config["model_type"] == "gemma2":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        tensors |= {f"{at}.{name}.weight": 1 + values(f"{at}.{name}", config["hidden_size"]) for name in norms}
        if config["model_type"] == "qwen3_moe":
            for name in ("q_norm", "k_norm"):
                tensors[f"{at}.self_attn.{name}.weight"] = 1 + values(f"{at}.{name}", width)
        if config["model_type"] == "qwen2":
            for name in "qkv":
                module = f"{at}.self_attn.{name}_proj"
                tensors[f"{module}.bias"] = values(f"{module}.bias", tensors[f"{module}.weight"].shape[0])
    tensors["model.norm.weight"] = 1 + values("norm", config["hidden_size"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return tensors


def write_adapter(folder: Path, base: dict[str, np.ndarray], config: dict[str, Any], *, embedding: bool) -> Path:
    """An adapter as PEFT and mergekit-extract-lora store it, and the weights that it makes."""
    peft = folder / "peft"
    peft.mkdir(parents=True)
    tensors, expected = {}, {}
    for name, (out, inputs) in modules(config).items():
        whole = name in ("model.embed_tokens", "lm_head")
        if whole and not embedding:
            continue
        a, b = values(f"{name}.A", RANK, inputs), values(f"{name}.B", out, RANK)
        weight = base[f"{name}.weight"].astype(np.float64)
        expected[f"{name}.weight"] = weight + ALPHA / RANK * b.astype(np.float64) @ a.astype(np.float64)
        prefix = f"base_model.model.{name}"
        if name == "model.embed_tokens":  # mergekit: A (rank, tokens), B (width, rank)
            tensors |= {f"{prefix}.lora_embedding_A": b.T.copy(), f"{prefix}.lora_embedding_B": a.T.copy()}
        else:
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, peft / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in modules(config)} - (set() if embedding else {"lm_head"}))
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (peft / "adapter_config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    save_file({k: v.astype(np.float32) for k, v in expected.items()}, folder / "expected.safetensors")
    return peft


def convert(source: Path, peft: Path, base: Path, output: Path, kind: str = "f32") -> None:
    command = [sys.executable, source / "convert_lora_to_gguf.py", peft, "--base", base, "--outfile", output]
    subprocess.run([*map(str, command), "--outtype", kind], check=True, capture_output=True)


def convert_base(source: Path, base: Path, output: Path) -> None:
    """``convert_hf_to_gguf.py --outtype f32``, without a tokenizer."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import ModelBase

    write = ModelBase.write

    def without_vocabulary(self: Any) -> None:
        self.set_vocab = lambda: self.gguf_writer.add_tokenizer_model("none")
        write(self)

    ModelBase.write = without_vocabulary
    sys.argv = ["convert", str(base), "--outfile", str(output), "--outtype", "f32", "--model-name", "tiny"]
    convert_hf_to_gguf.main()
    ModelBase.write = write


def make(source: Path, root: Path) -> None:
    for name, own in CONFIGS.items():
        config = {**_COMMON, **own}
        base = write_base(root / name / "base", config)
        peft = write_adapter(root / name / "lora", base, config, embedding=False)
        convert(source, peft, root / name / "base", root / name / "lora" / "adapter.gguf")
        if name == "llama":
            convert(source, peft, root / name / "base", root / name / "lora" / "adapter-q8_0.gguf", "q8_0")
            convert(source, peft, root / name / "base", root / name / "lora" / "adapter-f16.gguf", "f16")
            peft = write_adapter(root / name / "embedding", base, config, embedding=True)
            convert(source, peft, root / name / "base", root / name / "embedding" / "adapter.gguf")
        if name in ("llama", "mixtral"):
            convert_base(source, root / name / "base", root / name / "base.gguf")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from regenerate import keep, same_values

    keep(
        HERE,
        lambda root: make(options.source.resolve(), root),
        check=options.check,
        same=partial(same_values, rtol=0, atol=0),
    )


if __name__ == "__main__":
    main()
