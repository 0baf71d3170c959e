# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many families, with tokenizers and adapters: what the tests of other layers change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors, trainers
from torch import nn

__all__ = ["BOTH", "FAMILIES", "GPT2", "IDS", "SMALL", "in_memory", "load", "logits", "make", "tokenizer"]

SMALL: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: Mapping[str, Any] = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": 101}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}, "model.layers"),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", {"max_window_layers": 4}, "model.layers"),
    "qwen2 windows": (
        "Qwen2ForCausalLM",
        {"max_window_layers": 3, "use_sliding_window": True, "sliding_window": 4},
        "model.layers",
    ),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "smollm3": ("SmolLM3ForCausalLM", {}, "model.layers"),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 4}, "model.layers"),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}, "model.layers"),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
        },
        "model.layers",
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, "transformer.h"),
    "bert": ("BertForMaskedLM", {}, "bert.encoder.layer"),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "phi3 without a window": ("Phi3ForCausalLM", {"sliding_window": None}, "model.layers"),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}, "model.layers"),
    "qwen3 tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, "model.layers"),
}
IDS = torch.tensor([[1, 17, 44, 3, 90, 5, 61, 8, 22, 100, 7, 33]])


def make(family: str, folder: Path, **more: Any) -> Path:
    """A tiny model of a family, with values that differ everywhere."""
    name, fields, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**({} if "n_layer" in fields else dict(SMALL)) | dict(fields))
    torch.manual_seed(3)
    model = cls(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    model.tie_weights()
    model.save_pretrained(folder, **more)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS, **({"use_cache": False} if "Bert" not in type(model).__name__ else {}))
    return found.logits


def in_memory(folder: Path, path: str, order: Sequence[int]) -> torch.Tensor:
    """The logits of the model with its modules put in this order: each runs as the layer that it was."""
    model = load(folder)
    parent = model.get_submodule(path.rpartition(".")[0])
    stack = parent.get_submodule(path.rpartition(".")[2])
    types = getattr(model.config, "layer_types", None)
    setattr(parent, path.rpartition(".")[2], nn.ModuleList([copy.deepcopy(stack[old]) for old in order]))
    model.config.num_hidden_layers = len(order)
    if types is not None:
        model.config.layer_types = [types[old] for old in order]
    return logits(model)


def load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, told = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    assert not told["mismatched_keys"], told
    return model


BOTH = ("qkv", "gate-up")


def tokenizer(kind: str, folder: Path, text: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A trained tokenizer of a kind, of at most 300 tokens."""
    make_model, make_trainer, pre = {
        "BPE": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "WordPiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, pre_tokenizers.Whitespace()),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
    }[kind]
    made = tokenizers.Tokenizer(make_model)
    made.pre_tokenizer = pre
    extra = {"unk_token": "<unk>"} if kind == "Unigram" else {}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "BPE" else []
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        text, make_trainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, **extra)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast
