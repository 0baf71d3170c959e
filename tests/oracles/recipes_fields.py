# SPDX-License-Identifier: Apache-2.0
"""What the tables of tiny models share: how a model is described, and the fields of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BERT",
    "BLOOM",
    "DEBERTA",
    "DEBERTA_1",
    "DISTIL",
    "EURO",
    "GEMMA",
    "GEMMA3N",
    "GPT2",
    "GQA",
    "JINA",
    "LFM2",
    "LM",
    "MIXTURE",
    "MODERN",
    "MPNET",
    "MROPE",
    "OPT",
    "T5",
    "VOCAB",
    "YARN",
    "Case",
    "case_of",
    "rope",
]

VOCAB = 99


@dataclass(frozen=True)
class Case:
    """One model: class and fields of its configuration."""

    cls: str
    config: str
    fields: Mapping[str, Any]


LM: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = {**LM, "num_key_value_heads": 2, "tie_word_embeddings": False}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA = {**GQA, "head_dim": 16, "tie_word_embeddings": True}
GEMMA3N: dict[str, Any] = {
    **GQA,
    "tie_word_embeddings": True,
    "num_hidden_layers": 5,
    "head_dim": 16,
    "intermediate_size": [56, 48, 56, 40, 56],
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 5,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 90,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 6,
    "altup_num_inputs": 3,
    "activation_sparsity_pattern": [0.6, 0.0, 0.95, 0.3, 0.0],
}
OPT = {**LM, "ffn_dim": 56, "word_embed_proj_dim": 32}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "eos_token_id": None, "pad_token_id": 0}
BERT = {**LM, "type_vocab_size": 2, "num_labels": 3}
MPNET = {**BERT, "pad_token_id": 1}
DEBERTA: dict[str, Any] = {
    **BERT,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,
    "max_relative_positions": 8,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
MODERN: dict[str, Any] = {
    **LM,
    "num_labels": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 4,
}
JINA = {**BERT, "pad_token_id": 1, "type_vocab_size": 1}
EURO = {**GQA, "num_labels": 3}
DEBERTA_1 = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 56,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 56,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
MIXTURE = {**GQA, "num_hidden_layers": 2, "num_experts_per_tok": 2}
LFM2 = {**GQA, "block_multiple_of": 8, "tie_word_embeddings": True}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """The field of a rotary embedding of this `rope_type`."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


MROPE = rope("default", mrope_section=[1, 1, 2])


def case_of(name: str, fields: Mapping[str, Any], ending: str = "ForCausalLM", **more: Any) -> Case:
    """The case of a family whose class and configuration begin with the same name."""
    return Case(f"{name}{ending}", f"{name}Config", {**fields, **more})


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3)
