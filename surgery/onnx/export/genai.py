# SPDX-License-Identifier: Apache-2.0
"""``genai_config.json``: the configuration with which onnxruntime-genai (0.18) runs a folder as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from surgery.onnx.graph.contract import Contract
from surgery_formats.errors import MalformedError
from surgery_formats.text import show

__all__ = ["genai_config"]

_TYPES = frozenset(
    (
        "chatglm",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gptoss",
        "granite",
        "internlm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "phi3small",
        "phimoe",
        "qwen2",
        "qwen3",
        "smollm3",
    )
)
"""Decoders it knows by name (models/model_type.h); others with these inputs are ``decoder``, but ``gpt2`` differs."""


def genai_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    contract: Contract,
    heads: int,
    graph: str,
    *,
    position_ids: bool = False,
) -> bytes:
    """Create the file for a decoder's graph; token ids of generation_config.json, if there is one, take precedence."""
    kind = config.get("model_type")
    decoder = {
        "session_options": _session(contract),
        "filename": graph,
        "head_size": contract.head_dim,
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "num_attention_heads": heads,
        "num_hidden_layers": contract.layers,
        "num_key_value_heads": contract.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **({"position_ids": "position_ids"} if position_ids else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    eos = _token(config, generation, "eos_token_id")
    pad = _token(config, generation, "pad_token_id")
    first = eos[0] if isinstance(eos, list) else eos
    model = {
        "bos_token_id": _token(config, generation, "bos_token_id"),
        "context_length": contract.max_length,
        "decoder": decoder,
        "eos_token_id": eos,
        "pad_token_id": next((token for token in (pad, first) if token is not None), 0),
        "type": kind if kind in _TYPES else "decoder",
        "vocab_size": contract.vocabulary,
    }
    temperature = _number(generation, "temperature", 1.0)
    search = {
        "do_sample": bool(generation.get("do_sample", False)) and temperature > 0,
        "max_length": contract.max_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": contract.cache == "shared",
        "repetition_penalty": _number(generation, "repetition_penalty", 1.0) or 1.0,
        "temperature": temperature or 1.0,
        "top_k": int(_number(generation, "top_k", 50)),
        "top_p": _number(generation, "top_p", 1.0),
    }
    document = {"model": {key: value for key, value in model.items() if value is not None}, "search": search}
    return json.dumps(document, indent=2).encode() + b"\n"


def _session(contract: Contract) -> dict[str, Any]:
    """Use weights where they lie: onnxruntime would otherwise copy them to repack them."""
    cuda = [{"cuda": {"enable_cuda_graph": "0"}}] if contract.target == "cuda" else []
    # Codes are slow unless they are repacked.
    mapped = {} if contract.quantised else {"session.disable_prepacking": "1"}
    mapped |= {"session.disable_quant_qdq": "1"} if contract.has_float_codes else {}
    if cuda and contract.slots:  # as `surgery.onnx.run.opening` has it
        mapped["ep.cuda.enable_gemm_auto_tune"] = "1"
    return {"log_id": "onnxruntime-genai", **mapped, "provider_options": cuda}


def _number(generation: Mapping[str, Any], key: str, default: float) -> float:
    """Read a sampling setting; 0 is one: a top_k of 0 takes every token.

    Raises:
        MalformedError: it is not a number.
    """
    value = generation.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedError(f"{key} is {show(value, 40)}; it must be a number", file="generation_config.json")
    return float(value)


def _token(config: Mapping[str, Any], generation: Mapping[str, Any], key: str) -> Any:
    """Read one or several token ids; None if missing, which old configurations write as -1.

    Raises:
        MalformedError: it is not a token id.
    """
    value = generation.get(key)
    value = config.get(key) if value is None else value
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(token) is int for token in ids):
        raise MalformedError(f"{key} is {show(value, 40)}; it must be a token id", file="config.json")
    return None if value == -1 else value
