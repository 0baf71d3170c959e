# SPDX-License-Identifier: Apache-2.0
"""Bases and adapters of real sizes, made on the spot: Llama shapes with random (never zero) weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True

    def linear(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear layer."""
        head = self.hidden // self.heads
        out = {
            "q_proj": self.hidden,
            "o_proj": self.hidden,
            "k_proj": self.kv_heads * head,
            "v_proj": self.kv_heads * head,
        }
        name = module.rpartition(".")[2]
        if name == "down_proj":
            return self.hidden, self.intermediate
        return out.get(name, self.intermediate), self.hidden

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes as transformers stores them; a tied head is not stored."""
        found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocabulary, self.hidden))]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            found += [(f"{prefix}{module}.weight", self.linear(module)) for module in LINEAR]
            found += [
                (f"{prefix}{norm}.weight", (self.hidden,)) for norm in ("input_layernorm", "post_attention_layernorm")
            ]
        head = [] if self.tied else [("lm_head.weight", (self.vocabulary, self.hidden))]
        return [*found, ("model.norm.weight", (self.hidden,)), *head]

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary, "head_dim": self.hidden // self.heads,
            "tie_word_embeddings": self.tied, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
            "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "attention_bias": False,
        }  # fmt: skip


LARGE = Shape(2048, 16, 32, 8, 8192, 128256)  # 1.24 B: Llama 3.2 1B
SMALL = Shape(1024, 16, 16, 4, 4096, 64128)  # a quarter of it
LAYER = Shape(
    4096, 1, 32, 32, 11008, 1000
)  # one layer of Llama 7B: four matrices of 4096 x 4096, three of 11008 x 4096
EIGHT = Shape(4096, 32, 32, 8, 14336, 128256, tied=False)  # 8 B: Llama 3 8B


def write_base(shape: Shape, folder: Path, shards: int = 3, seed: int = 0) -> None:
    """A bf16 folder with an index; values are bf16-rounded normals of scale 0.02, a block of them repeated with a shift."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(seed).normal(0, 0.02, (1 << 24) + 7919).astype(np.float32)
    pool = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
    tensors = shape.tensors()
    weight_map = {}
    for file, group in shards_of(tensors, shards).items():
        header, ranges = layout([(name, DType.BF16, size) for name, size in group], {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(header)
            for position, (name, _) in enumerate(group):
                weight_map[name] = file
                left, at = ranges[name][1], position * 7918 * 2 % len(pool)
                while left:
                    piece = pool[at : at + left]
                    out.write(piece)
                    left -= len(piece)
                    at = 0
    describe(shape, folder, weight_map)


def shards_of(tensors: list[tuple[str, tuple[int, ...]]], shards: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which tensors lie in which file, about evenly."""
    share = sum(int(np.prod(s)) for _, s in tensors) / shards
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in tensors:
        if filled >= share * len(groups) and len(groups) < shards:
            groups.append([])
        groups[-1].append((name, size))
        filled += int(np.prod(size))
    return {f"model-{number:05d}-of-{shards:05d}.safetensors": group for number, group in enumerate(groups, 1)}


def describe(shape: Shape, folder: Path, weight_map: dict[str, str]) -> None:
    """The index and the configuration."""
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def write_adapter(shape: Shape, folder: Path, rank: int = 16, seed: int = 1) -> None:
    """A PEFT LoRA on every linear layer, float32, alpha = 2 * rank."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    arrays = {}
    for layer in range(shape.layers):
        for module in LINEAR:
            out, inner = shape.linear(module)
            key = f"base_model.model.model.layers.{layer}.{module}"
            arrays[f"{key}.lora_A.weight"] = rng.normal(0, 0.02, (rank, inner)).astype(np.float32)
            arrays[f"{key}.lora_B.weight"] = rng.normal(0, 0.02, (out, rank)).astype(np.float32)
    header, _ = layout([(name, DType.F32, value.shape) for name, value in arrays.items()], {"format": "pt"})
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(header)
        for value in arrays.values():
            file.write(value.tobytes())
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(m.rpartition(".")[2] for m in LINEAR),
        "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
