# SPDX-License-Identifier: Apache-2.0
"""A soft prompt as an adapter of PEFT, made in memory: what combines, converts and transfers prompts writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import Prefix, SoftPrompt
from surgery_formats.tensors.tensor import Tensor

__all__ = ["TABLE", "prompt_adapter"]

TABLE = "prompt_embeddings"


def prompt_adapter(
    path: Path, kind: str, table: Tensor, tokens: int, dim: int, prefix: Prefix | None = None, base_name: str = ""
) -> Adapter:
    """An adapter of `kind` with these virtual tokens.

    Args:
        path: Where it comes from, for messages.
        kind: ``PROMPT_TUNING``, ``P_TUNING``, ``CPT``, ``PREFIX_TUNING``.
        table: As files of PEFT have it, see `SoftPrompt`.
        tokens: How many.
        dim: Numbers per token: of an embedding, or of all key heads of a layer.
        prefix: Layout of keys and values.
        base_name: The base, as the configuration shall name it.
    """
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "num_attention_heads": prefix.kv_heads if prefix else None,
        "num_layers": prefix.layers if prefix else None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": kind,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": dim,
        **_OF_KINDS.get(kind, {}),
    }
    if kind == "CPT":
        config |= {"cpt_token_ids": [0] * tokens, "cpt_mask": [1] * tokens, "cpt_tokens_type_mask": [1] * tokens}
    if kind == "P_TUNING":
        config["encoder_hidden_size"] = dim
    prompt = SoftPrompt(kind, table, tokens, dim, 1, prefix).check()
    return Adapter(path, "peft", kind, {}, (table,), prompt=prompt, base_name=base_name, config=config)


_OF_KINDS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None},
    "P_TUNING": {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0},
    "PREFIX_TUNING": {"prefix_projection": False, "encoder_hidden_size": None},
}
