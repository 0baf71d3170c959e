# SPDX-License-Identifier: Apache-2.0
"""Configurations as they were published, with keys that nothing reads today: none of them is refused for such a key."""

from __future__ import annotations

from typing import Any

import pytest

from surgery_formats.models.families.parameters import model_of

_BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
_DEBERTA = {
    **_BERT,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "position_buckets": 256,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
    "vocab_size": 128100,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "ModernBERT-base": {
        "architectures": ["ModernBertForMaskedLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_dropout": 0.0,
        "classifier_pooling": "mean",
        "cls_token_id": 50281,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "gradient_checkpointing": False,
        "hidden_activation": "gelu",
        "hidden_size": 768,
        "initializer_cutoff_factor": 2.0,
        "intermediate_size": 1152,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "pad_token_id": 50283,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "vocab_size": 50368,
    },
    "deberta-v3-base": {**_DEBERTA, "model_type": "deberta-v2"},
    "deberta-v2-xlarge": {
        **_DEBERTA,
        "model_type": "deberta-v2",
        "attention_head_size": 64,
        "conv_act": "gelu",
        "conv_kernel_size": 3,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 24,
        "num_hidden_layers": 24,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": 1536,
    },
    "deberta-base": {
        **_BERT,
        "model_type": "deberta",
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "padding_idx": 0,
        "pos_att_type": "c2p|p2c",
        "position_biased_input": False,
        "relative_attention": True,
        "type_vocab_size": 0,
        "vocab_size": 50265,
    },
    "all-mpnet-base-v2": {
        **_BERT,
        "architectures": ["MPNetForMaskedLM"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "mpnet",
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        "vocab_size": 30527,
    },
    "albert-base-v2": {
        **_BERT,
        "architectures": ["AlbertForMaskedLM"],
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 128,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "inner_group_num": 1,
        "layer_norm_eps": 1e-12,
        "model_type": "albert",
        "net_structure_type": 0,
        "num_hidden_groups": 1,
        "num_memory_blocks": 0,
        "type_vocab_size": 2,
        "vocab_size": 30000,
    },
    "electra-base-generator": {
        **_BERT,
        "architectures": ["ElectraForMaskedLM"],
        "embedding_size": 768,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "layer_norm_eps": 1e-12,
        "model_type": "electra",
        "num_attention_heads": 4,
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "summary_type": "first",
        "summary_use_proj": True,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "EuroBERT-210m": {
        "architectures": ["EuroBertForMaskedLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clf_pooling": "late",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "eurobert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "num_key_value_heads": 12,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    config = PUBLISHED[name]
    model = model_of(config, ())
    assert (model.hidden, len(model.layers)) == (config["hidden_size"], config["num_hidden_layers"])
    assert model.layers[0].attention.head_dim == 64


def test_eurobert_scores_as_its_own_configuration_says() -> None:
    config = {**PUBLISHED["EuroBERT-210m"], "architectures": ["EuroBertForSequenceClassification"]}
    late, first = (model_of({**config, "clf_pooling": pooling}, ()).head for pooling in ("late", "bos"))
    assert (late.tokens, late.early, first.tokens) == ("mean", 1, "first")  # type: ignore[union-attr]
