# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders, of text and of speech."""

from __future__ import annotations

from typing import Any

from tests.oracles.recipes_fields import T5, VOCAB, Case

__all__ = ["OWN_HEAD", "PAIRS"]

_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_GATED = {**T5, "feed_forward_proj": "gated-gelu"}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "max_source_positions": 12,
    "max_target_positions": 40,
    "num_mel_bins": 5,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

PAIRS: dict[str, Case] = {
    "t5": Case("T5ForConditionalGeneration", "T5Config", {**T5, "num_layers": 3, "num_decoder_layers": 2}),
    "t5_flan": Case("T5ForConditionalGeneration", "T5Config", {**_GATED, "d_kv": 12, "tie_word_embeddings": False}),
    "mt5": Case("MT5ForConditionalGeneration", "MT5Config", _GATED),
    "umt5": Case("UMT5ForConditionalGeneration", "UMT5Config", _GATED),
    "bart": Case("BartForConditionalGeneration", "BartConfig", _BART),
    "bart_scaled": Case(
        "BartForConditionalGeneration", "BartConfig", {**_BART, "scale_embedding": True, "activation_function": "relu"}
    ),
    "mbart": Case("MBartForConditionalGeneration", "MBartConfig", {**_BART, "scale_embedding": True}),
    "marian": Case("MarianMTModel", "MarianConfig", {**_BART, "scale_embedding": True, "activation_function": "swish"}),
    "pegasus": Case("PegasusForConditionalGeneration", "PegasusConfig", {**_BART, "scale_embedding": True}),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
}
OWN_HEAD = {"t5_flan"}
"""Models whose head `made` draws apart from the embedding that the class ties it to."""
