# SPDX-License-Identifier: Apache-2.0
"""PEFT's prompt learning: one tensor ``prompt_embeddings``, and the head of a classifier beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.read_config import COMMON, PeftConfig, Switches
from surgery_formats.canonical.prompts import Prefix, SoftPrompt
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["PROMPTS", "prompt_history", "read_prompt"]

_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
_SWITCHES = Switches(
    harmless=COMMON
    | {
        "encoder_reparameterization_type",  # what is stored is what the encoder, or the projection, made
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "num_frozen_tokens",
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    },
    understood=frozenset(
        [
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
            "modules_to_save",
        ]
    ),
)
PROMPTS = dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _SWITCHES)
"""Kinds of soft prompts, and what the fields of their configuration mean."""


def read_prompt(tensors: Sequence[StoredTensor], config: PeftConfig) -> SoftPrompt:
    """The virtual tokens of an adapter.

    ``num_attention_heads`` and ``token_dim`` of a prefix are those of keys and values: PEFT overwrites them for
    grouped-query attention.

    Raises:
        MalformedError: no such tensor, or a field that is missing or odd.
        FitError: table and configuration contradict each other.
    """
    tables = [tensor for tensor in tensors if tensor.name.rpartition(".")[2] == "prompt_embeddings"]
    if len(tables) != 1:
        raise MalformedError(f"{len(tables)} tensors 'prompt_embeddings' in a soft prompt", file=config.file.parent)
    table = tables[0]
    if len(table.shape) < 2 or not table.numel:
        raise MalformedError(f"virtual tokens of shape {list(table.shape)}", file=table.file.path, tensor=table.name)
    submodules = _field(config, "num_transformer_submodules", 1)
    if submodules > 2:
        raise FitError(f"'num_transformer_submodules' is {submodules}", file=config.file)
    tokens = _field(config, "num_virtual_tokens", table.shape[-2])
    if config.kind not in _KEYS_AND_VALUES:
        dim = _field(config, "token_dim", table.shape[-1])
        return SoftPrompt(config.kind, table, tokens, dim, submodules).check()
    layers, heads, dim = (_field(config, key) for key in ("num_layers", "num_attention_heads", "token_dim"))
    if dim % heads:
        raise FitError(f"'token_dim' {dim} is no multiple of 'num_attention_heads' {heads}", file=config.file)
    return SoftPrompt(config.kind, table, tokens, dim, submodules, Prefix(layers, heads, dim // heads)).check()


def prompt_history(config: Mapping[str, Any]) -> dict[str, str]:
    """What the configuration says of a prompt's making: who wrote it, what it began as and was trained through."""
    found: dict[str, str] = {}
    if isinstance(version := config.get("peft_version"), str):
        found["written by"] = f"PEFT {version}"
    if isinstance(text := config.get("prompt_tuning_init_text"), str):
        found["began as"] = f"the text '{text}'"
    elif isinstance(ids := config.get("cpt_token_ids"), list):
        found["began as"] = f"the tokens {', '.join(map(str, ids))}"
    elif isinstance(init := config.get("prompt_tuning_init"), str):
        found["began as"] = {
            "RANDOM": "random numbers (PEFT says so by default)",
            "SAMPLE_VOCAB": "rows of the vocabulary",
        }.get(init, init)
    if isinstance(encoder := config.get("encoder_reparameterization_type"), str):
        found["trained through"] = f"an encoder ({encoder}), whose output is stored"
    elif config.get("prefix_projection") is True:
        found["trained through"] = "a projection, whose output is stored"
    return found


def _field(config: PeftConfig, key: str, default: int = 0) -> int:
    if config.raw.get(key) is None and not default:
        raise MalformedError(f"no '{key}': the layout of the keys and values cannot be told", file=config.file)
    return config.integer(key, default, low=1)
