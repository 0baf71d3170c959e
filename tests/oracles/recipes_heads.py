# SPDX-License-Identifier: Apache-2.0
"""Heads for tasks other than those of the tables of decoders and encoders."""

from __future__ import annotations

from tests.oracles.recipes_fields import (
    BERT,
    BLOOM,
    DEBERTA,
    DISTIL,
    GEMMA,
    GPT2,
    GQA,
    JINA,
    LFM2,
    LM,
    MIXTURE,
    MODERN,
    MPNET,
    MROPE,
    OPT,
    YARN,
    Case,
    case_of,
    rope,
)

__all__ = ["HEADS"]

_NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
_CLASSIFIED = {"num_labels": 3, "pad_token_id": 4}

HEADS: dict[str, Case] = {
    "llama_classifier": case_of("Llama", {**GQA, **_CLASSIFIED}, "ForSequenceClassification"),
    "llama_tokens": case_of("Llama", {**GQA, **_CLASSIFIED}, "ForTokenClassification"),
    "llama_spans": case_of("Llama", GQA, "ForQuestionAnswering"),
    "llama_bare": case_of("Llama", GQA, "Model"),
    "qwen2_vl_language": Case("Qwen2VLTextModel", "Qwen2VLTextConfig", {**GQA, **MROPE}),
    "qwen2_5_vl_language": Case("Qwen2_5_VLTextModel", "Qwen2_5_VLTextConfig", {**GQA, **MROPE}),
    "qwen3_vl_language": Case(
        "Qwen3VLTextModel",
        "Qwen3VLTextConfig",
        {
            **GQA,
            "head_dim": 16,
            **rope("default", mrope_section=[3, 3, 2], mrope_interleaved=True),
        },
    ),
    "qwen3_classifier": case_of("Qwen3", {**GQA, **_CLASSIFIED, "head_dim": 16}, "ForSequenceClassification"),
    "qwen3_spans": case_of("Qwen3", {**GQA, "head_dim": 16}, "ForQuestionAnswering"),
    "mistral_classifier": case_of(
        "Mistral", {**GQA, **_CLASSIFIED}, "ForSequenceClassification", sliding_window=5, num_labels=1
    ),
    "gemma2_classifier": case_of("Gemma2", {**GEMMA, **_CLASSIFIED}, "ForSequenceClassification", sliding_window=5),
    "gemma3_classifier": Case(
        "Gemma3TextForSequenceClassification",
        "Gemma3TextConfig",
        {**GEMMA, **_CLASSIFIED, "sliding_window": 5, "sliding_window_pattern": 3},
    ),
    "gpt_oss_classifier": case_of(
        "GptOss",
        {**MIXTURE, **_CLASSIFIED, **YARN},
        "ForSequenceClassification",
        num_local_experts=5,
        head_dim=16,
        sliding_window=5,
    ),
    "bloom_classifier": Case("BloomForSequenceClassification", "BloomConfig", {**BLOOM, **_CLASSIFIED}),
    "falcon_tokens": Case("FalconForTokenClassification", "FalconConfig", {**LM, **_CLASSIFIED}),
    "gptj_spans": Case("GPTJForQuestionAnswering", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "phi_classifier": case_of("Phi", {**GQA, **_CLASSIFIED}, "ForSequenceClassification"),
    "nemotron_tokens": case_of("Nemotron", {**GQA, **_CLASSIFIED}, "ForTokenClassification", head_dim=16),
    "lfm2_bare": case_of("Lfm2", {**LFM2, "layer_types": ["conv", "full_attention", "conv"]}, "Model"),
    "gpt2_classifier": Case("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, **_CLASSIFIED}),
    "gpt2_tokens": Case("GPT2ForTokenClassification", "GPT2Config", {**GPT2, **_CLASSIFIED}),
    "gpt2_spans": Case("GPT2ForQuestionAnswering", "GPT2Config", GPT2),
    "gpt_neox_tokens": case_of("GPTNeoX", {**LM, **_CLASSIFIED}, "ForTokenClassification"),
    "opt_classifier": case_of("OPT", {**OPT, **_CLASSIFIED}, "ForSequenceClassification"),
    "opt_350m_classifier": case_of("OPT", {**OPT, **_CLASSIFIED, **_NARROW}, "ForSequenceClassification"),
    "bert_spans": Case("BertForQuestionAnswering", "BertConfig", {**BERT, "num_labels": 2}),
    "bert_masks": Case("BertForMaskedLM", "BertConfig", BERT),
    "bert_masks_untied": Case("BertForMaskedLM", "BertConfig", {**BERT, "tie_word_embeddings": False}),
    "bert_choices": Case("BertForMultipleChoice", "BertConfig", BERT),
    "roberta_spans": Case("RobertaForQuestionAnswering", "RobertaConfig", {**BERT, "pad_token_id": 1, "num_labels": 2}),
    "roberta_masks": Case("RobertaForMaskedLM", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "roberta_choices": Case("RobertaForMultipleChoice", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "distilbert_spans": Case("DistilBertForQuestionAnswering", "DistilBertConfig", {**DISTIL, "num_labels": 2}),
    "distilbert_masks": Case("DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    "albert_spans": Case("AlbertForQuestionAnswering", "AlbertConfig", {**BERT, "embedding_size": 20, "num_labels": 2}),
    "albert_masks": Case("AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 20}),
    "albert_choices": Case("AlbertForMultipleChoice", "AlbertConfig", {**BERT, "embedding_size": 20}),
    "electra_spans": Case(
        "ElectraForQuestionAnswering", "ElectraConfig", {**BERT, "embedding_size": 20, "num_labels": 2}
    ),
    "electra_masks": Case("ElectraForMaskedLM", "ElectraConfig", {**BERT, "embedding_size": 20}),
    "mpnet_spans": Case("MPNetForQuestionAnswering", "MPNetConfig", {**MPNET, "num_labels": 2}),
    "mpnet_masks": Case("MPNetForMaskedLM", "MPNetConfig", MPNET),
    "mpnet_choices": Case("MPNetForMultipleChoice", "MPNetConfig", MPNET),
    "deberta_choices": Case("DebertaV2ForMultipleChoice", "DebertaV2Config", DEBERTA),
    "deberta_span": Case("DebertaV2ForQuestionAnswering", "DebertaV2Config", {**DEBERTA, "num_labels": 2}),
    "electra_choices": Case("ElectraForMultipleChoice", "ElectraConfig", {**BERT, "embedding_size": 20}),
    "modernbert_choices": Case("ModernBertForMultipleChoice", "ModernBertConfig", MODERN),
    "modernbert_choices_mean": Case(
        "ModernBertForMultipleChoice", "ModernBertConfig", {**MODERN, "classifier_pooling": "mean"}
    ),
    "modernbert_span": Case("ModernBertForQuestionAnswering", "ModernBertConfig", {**MODERN, "num_labels": 2}),
    "jina_v3_span": Case("JinaEmbeddingsV3ForQuestionAnswering", "JinaEmbeddingsV3Config", {**JINA, "num_labels": 2}),
    "distilbert_choices": Case("DistilBertForMultipleChoice", "DistilBertConfig", DISTIL),
}
