# SPDX-License-Identifier: Apache-2.0
"""Makes the GGUF files beside it with llama.cpp's own converter and quantiser: small models of every known architecture.

    python make_gguf_models.py LLAMA_CPP [--check]

LLAMA_CPP is the source of llama.cpp (in the sdist of llama-cpp-python: ``vendor/llama.cpp``), whose converter runs from
there. Needs torch and transformers for the converter, and llama_cpp for ``llama_model_quantize``. ``--check`` compares
with the files that are there instead of writing them.

Values follow from names alone, see `values`, so that the tests need no copy of them; the converter is given no tokenizer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 12,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "float32",
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": _LLAMA3, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 8.0,
    },
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000.0},
    "qwen2moe": {
        "model_type": "qwen2_moe",
        "num_experts": 3,
        "shared_expert_intermediate_size": 24,
        "num_hidden_layers": 1,
        **_EXPERTS,
    },
    "qwen3moe": {"model_type": "qwen3_moe", "num_experts": 3, "head_dim": 16, **_EXPERTS},
    "gemma": {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 500000.0},
    "olmo": {"model_type": "olmo", "rope_theta": 10000.0, "clip_qkv": None},
    "olmoe": {"model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 2},
    "starcoder2": {"model_type": "starcoder2", "norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None},
    "command-r": {"model_type": "cohere", "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True},
    "phi2": {"model_type": "phi", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "num_key_value_heads": 4},
    "smollm3": {"model_type": "smollm3", "rope_theta": 2000000.0, "no_rope_layer_interval": 4},
    "phi3": {"model_type": "phi3", "original_max_position_embeddings": 64, "sliding_window": 24},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 64,
        "n_ctx": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    },
    # Rows of whole blocks of 256, for K-quants; few of them, so that the file stays small.
    "wide": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 10000.0,
    },
}


def values(name: str, sizes: tuple[int, ...]) -> np.ndarray:
    """The values of a parameter, which float16 and bfloat16 hold."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return (draw.integers(-100, 101, sizes) / 1024).astype(np.float32)


def write_model(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A model of transformers with these values; returns its whole configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = {**({} if config["model_type"] == "gpt2" else _COMMON), **config}
    if config["model_type"] == "olmo":  # its norms have no parameters, and an epsilon of their own
        del whole["rms_norm_eps"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**whole))
    names = set()
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(values(name, tuple(parameter.shape)))
        names.add(name)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def convert(source: Path, folder: Path, output: Path) -> None:
    """``convert_hf_to_gguf.py --outtype f16``, without a tokenizer."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import ModelBase

    write = ModelBase.write

    def without_vocabulary(self: Any) -> None:
        self.set_vocab = lambda: self.gguf_writer.add_tokenizer_model("none")
        write(self)

    ModelBase.write = without_vocabulary
    # The converter cuts the embedding of Gemma 3 to the tokens of this file.
    vocabulary = {"model": {"vocab": {f"t{i}": i for i in range(_COMMON["vocab_size"])}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    sys.argv = ["convert", str(folder), "--outfile", str(output), "--outtype", "f16", "--model-name", "tiny"]
    convert_hf_to_gguf.main()
    ModelBase.write = write


def quantise(source: Path, output: Path, file_type: int) -> None:
    """``llama_model_quantize``."""
    from llama_cpp import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)) == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    made: dict[str, bytes] = {}
    configs = {}
    for name, config in CONFIGS.items():
        if options.only and name not in options.only.split(","):
            continue
        with tempfile.TemporaryDirectory() as place:
            folder, output = Path(place) / "model", Path(place) / f"{name}.gguf"
            folder.mkdir()
            configs[name] = write_model(folder, config)
            convert(options.source.resolve(), folder, output)
            if name == "wide":
                quantise(output, Path(place) / "q.gguf", 15)  # LLAMA_FTYPE_MOSTLY_Q4_K_M
                output = Path(place) / "q.gguf"
            made[f"{name}.gguf"] = output.read_bytes()
    if options.only:
        configs = {**json.loads((HERE / "configs.json").read_text()), **configs}
    made["configs.json"] = json.dumps(configs, indent=1, sort_keys=True).encode() + b"\n"
    for name, data in made.items():
        if options.check:
            assert (HERE / name).read_bytes() == data, f"{name} differs"
        else:
            (HERE / name).write_bytes(data)


if __name__ == "__main__":
    main()
