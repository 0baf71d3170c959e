# SPDX-License-Identifier: Apache-2.0
"""A model of one layer with all that belongs to it, made by the commands: what the targets of commands and documents damage."""

from __future__ import annotations

import atexit
import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType

__all__ = ["CONFIG", "TOKENIZER", "files_below", "graph_first", "safetensors_bytes", "world", "world_folder"]

HIDDEN, MLP, VOCABULARY, RANK = 8, 16, 16, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "torch_dtype": "float32",
}
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
_WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab"]
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": number,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, word in enumerate(_WORDS[:3])
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {word: number for number, word in enumerate(_WORDS)},
        "merges": [["a", "b"]],
    },
}
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "mask_token": "<unk>",
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
    "chat_template": "{% for m in messages %}<s>{{ m['role'] }}: {{ m.content | trim }}{% endfor %}",
}


def safetensors_bytes(
    tensors: Mapping[str, numpy.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A file of arrays of float32."""
    header, ranges = layout([(name, DType.F32, value.shape) for name, value in tensors.items()], dict(metadata or {}))
    parts = sorted((ranges[name][0], value.astype("<f4").tobytes()) for name, value in tensors.items())
    return bytes(header) + b"".join(data for _, data in parts)


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@cache
def world_folder() -> Path:
    """Folders on disk, which stay until the program ends: base, tuned, lora, prompt, merged (so that it can be taken back), graph, swap."""
    import surgery

    memory = Path("/dev/shm")
    at = Path(mkdtemp(prefix="surgery-fuzz-world-", dir=memory if os.access(memory, os.W_OK) else None))
    atexit.register(_remove, at, os.getpid())
    for name, strength in (("base", 0.0), ("tuned", 0.1)):
        _write(at / name, _base(strength))
    _write(at / "lora", _lora())
    _write(at / "prompt", _prompt())
    surgery.merge(at / "base", at / "lora", output=at / "merged", reversible=True)
    surgery.export_onnx(at / "base", output=at / "graph")
    surgery.export_onnx(at / "base", swap=at / "lora", output=at / "swap")
    return at


def _remove(folder: Path, made_by: int) -> None:
    if os.getpid() == made_by:
        shutil.rmtree(folder)


def graph_first(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a folder with the graph as the first."""
    return {"model.onnx": files["model.onnx"], **files}


@cache
def world() -> Mapping[str, Mapping[str, bytes]]:
    """The files of each folder of `world_folder`, by name."""
    return {folder.name: files_below(folder) for folder in sorted(world_folder().iterdir())}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def _base(strength: float) -> dict[str, bytes]:
    draw, more = numpy.random.default_rng(0), numpy.random.default_rng(1)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in LINEAR.items()}
    tensors = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    for name in shapes if strength else ():
        rows, cols = shapes[name]
        tensors[name] = tensors[name] + strength * more.standard_normal((rows, 1)) @ more.standard_normal((1, cols))
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        tensors[f"{norm}.weight"] = numpy.ones(HIDDEN)
    return {
        "model.safetensors": safetensors_bytes(tensors, {"format": "pt"}),
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tokenizer_config.json": json.dumps(_SETTINGS).encode(),
        "generation_config.json": b'{"eos_token_id": [2], "suppress_tokens": [3]}',
    }


def _lora() -> dict[str, bytes]:
    draw, tensors = numpy.random.default_rng(2), {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        rows, cols = LINEAR[name]
        stem = f"base_model.model.model.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = draw.standard_normal((RANK, cols))
        tensors[f"{stem}.lora_B.weight"] = draw.standard_normal((rows, RANK))
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return {"adapter_model.safetensors": safetensors_bytes(tensors), "adapter_config.json": json.dumps(config).encode()}


def _prompt() -> dict[str, bytes]:
    rows = numpy.random.default_rng(3).standard_normal((3, HIDDEN))
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": HIDDEN, "num_layers": 1}
    config |= {"num_attention_heads": 2, "num_transformer_submodules": 1, "task_type": "CAUSAL_LM"}
    return {
        "adapter_model.safetensors": safetensors_bytes({"prompt_embeddings": rows}),
        "adapter_config.json": json.dumps(config).encode(),
    }
