# SPDX-License-Identifier: Apache-2.0
"""Encoders of text: classifiers of sequences and tokens, masks, sentence embeddings."""

from __future__ import annotations

from tests.oracles.recipes_fields import BERT, DEBERTA, DEBERTA_1, DISTIL, EURO, JINA, MODERN, MPNET, T5, Case, rope

__all__ = ["ENCODERS"]

ENCODERS: dict[str, Case] = {
    "bert_sequence": Case("BertForSequenceClassification", "BertConfig", BERT),
    "bert_token": Case("BertForTokenClassification", "BertConfig", {**BERT, "hidden_act": "gelu_new"}),
    "bert_sentence": Case("BertModel", "BertConfig", BERT),
    "roberta_sequence": Case("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "roberta_token": Case("RobertaForTokenClassification", "RobertaConfig", {**BERT, "pad_token_id": 3}),
    "roberta_sentence": Case("RobertaModel", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "xlm_roberta_sequence": Case(
        "XLMRobertaForSequenceClassification", "XLMRobertaConfig", {**BERT, "pad_token_id": 1}
    ),
    "xlm_roberta_token": Case("XLMRobertaForTokenClassification", "XLMRobertaConfig", {**BERT, "pad_token_id": 1}),
    "xlm_roberta_sentence": Case("XLMRobertaModel", "XLMRobertaConfig", {**BERT, "pad_token_id": 1}),
    "xlm_roberta_mask": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", {**BERT, "pad_token_id": 1}),
    "camembert_sequence": Case("CamembertForSequenceClassification", "CamembertConfig", {**BERT, "pad_token_id": 1}),
    "camembert_mask": Case("CamembertForMaskedLM", "CamembertConfig", {**BERT, "pad_token_id": 1}),
    "camembert_token": Case("CamembertForTokenClassification", "CamembertConfig", {**BERT, "pad_token_id": 1}),
    "distilbert_sequence": Case("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "distilbert_token": Case("DistilBertForTokenClassification", "DistilBertConfig", DISTIL),
    "distilbert_sentence": Case("DistilBertModel", "DistilBertConfig", DISTIL),
    "electra_sequence": Case("ElectraForSequenceClassification", "ElectraConfig", {**BERT, "embedding_size": 20}),
    "electra_token": Case("ElectraForTokenClassification", "ElectraConfig", {**BERT, "embedding_size": 32}),
    "electra_sentence": Case("ElectraModel", "ElectraConfig", {**BERT, "embedding_size": 20}),
    "albert_sequence": Case("AlbertForSequenceClassification", "AlbertConfig", {**BERT, "embedding_size": 20}),
    "albert_token": Case(
        "AlbertForTokenClassification",
        "AlbertConfig",
        {**BERT, "embedding_size": 20, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "albert_sentence": Case("AlbertModel", "AlbertConfig", {**BERT, "embedding_size": 32, "hidden_act": "gelu"}),
    "mpnet_sequence": Case("MPNetForSequenceClassification", "MPNetConfig", MPNET),
    "mpnet_token": Case("MPNetForTokenClassification", "MPNetConfig", MPNET),
    "mpnet_sentence": Case("MPNetModel", "MPNetConfig", MPNET),
    "deberta_v2_sequence": Case("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA),
    "deberta_v2_token": Case(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        {
            **DEBERTA,
            "share_att_key": False,
            "position_biased_input": True,
            "embedding_size": 20,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "pos_att_type": "p2c|c2p",
            "type_vocab_size": 2,
        },
    ),
    "deberta_v2_sentence": Case(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **DEBERTA,
            "position_buckets": -1,
            "max_relative_positions": 5,
            "pos_att_type": ["c2p"],
            "norm_rel_ebd": "none",
        },
    ),
    "deberta_v2_positions_to_contents": Case(
        "DebertaV2Model",
        "DebertaV2Config",
        {**DEBERTA, "pos_att_type": ["p2c"], "share_att_key": False, "conv_kernel_size": 5, "conv_groups": 4},
    ),
    "deberta_v2_absolute": Case(
        "DebertaV2Model", "DebertaV2Config", {**DEBERTA, "relative_attention": False, "position_biased_input": True}
    ),
    "deberta_sequence": Case("DebertaForSequenceClassification", "DebertaConfig", DEBERTA_1),
    "deberta_token": Case(
        "DebertaForTokenClassification",
        "DebertaConfig",
        {**DEBERTA_1, "pos_att_type": "c2p", "norm_rel_ebd": "layer_norm"},
    ),
    "deberta_sentence": Case("DebertaModel", "DebertaConfig", {**DEBERTA_1, "max_relative_positions": 5}),
    "deberta_mask": Case("DebertaForMaskedLM", "DebertaConfig", {**DEBERTA_1, "pos_att_type": ["p2c"]}),
    "deberta_v2_mask": Case("DebertaV2ForMaskedLM", "DebertaV2Config", {**DEBERTA, "embedding_size": 20}),
    "deberta_v3_mask": Case("DebertaV2ForMaskedLM", "DebertaV2Config", {**DEBERTA, "legacy": False}),
    "modernbert_sequence": Case("ModernBertForSequenceClassification", "ModernBertConfig", MODERN),
    "modernbert_mean": Case(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**MODERN, "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "mlp_bias": True},
    ),
    "modernbert_token": Case(
        "ModernBertForTokenClassification",
        "ModernBertConfig",
        {**MODERN, "attention_bias": True, "local_attention": 7},
    ),
    "modernbert_sentence": Case(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **MODERN,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "modernbert_mask": Case("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "modernbert_mask_untied": Case(
        "ModernBertForMaskedLM", "ModernBertConfig", {**MODERN, "tie_word_embeddings": False, "decoder_bias": False}
    ),
    "nomic_bert_sequence": Case("NomicBertForSequenceClassification", "NomicBertConfig", BERT),
    "nomic_bert_token": Case("NomicBertForTokenClassification", "NomicBertConfig", {**BERT, "hidden_act": "gelu"}),
    "nomic_bert_sentence": Case("NomicBertModel", "NomicBertConfig", {**BERT, **rope("linear", factor=2.5)}),
    "nomic_bert_mask": Case("NomicBertForMaskedLM", "NomicBertConfig", BERT),
    "jina_v3_sequence": Case("JinaEmbeddingsV3ForSequenceClassification", "JinaEmbeddingsV3Config", JINA),
    "jina_v3_token": Case("JinaEmbeddingsV3ForTokenClassification", "JinaEmbeddingsV3Config", JINA),
    "jina_v3_sentence": Case("JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", {**JINA, "type_vocab_size": 2}),
    "jina_v3_mask": Case("JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3Config", JINA),
    "eurobert_late": Case("EuroBertForSequenceClassification", "EuroBertConfig", EURO),
    "eurobert_mean": Case(
        "EuroBertForSequenceClassification", "EuroBertConfig", {**EURO, "classifier_pooling": "mean"}
    ),
    "eurobert_first": Case(
        "EuroBertForSequenceClassification", "EuroBertConfig", {**EURO, "classifier_pooling": "bos"}
    ),
    "eurobert_token": Case("EuroBertForTokenClassification", "EuroBertConfig", {**EURO, "attention_bias": True}),
    "eurobert_sentence": Case("EuroBertModel", "EuroBertConfig", {**EURO, "head_dim": 12}),
    "eurobert_mask": Case("EuroBertForMaskedLM", "EuroBertConfig", {**EURO, "mlp_bias": True}),
    "gte_sequence": Case("GteForSequenceClassification", "GteConfig", BERT),
    "gte_token": Case("GteForTokenClassification", "GteConfig", {**BERT, "type_vocab_size": 0}),
    "gte_sentence": Case("GteModel", "GteConfig", {**BERT, "type_vocab_size": 1}),
    "gte_mask": Case("GteForMaskedLM", "GteConfig", {**BERT, "hidden_act": "gelu_new"}),
    "t5_encoder": Case("T5EncoderModel", "T5Config", T5),
    "t5_encoder_gated": Case("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", "d_kv": 12}),
    "mt5_encoder": Case("MT5EncoderModel", "MT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "umt5_encoder": Case("UMT5EncoderModel", "UMT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
}
